// Columns of text in the tables of results are aligned to the left; counted from the right, because rows begin with headings.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("div.cell_output table")) {
    const rows = [...table.rows].map((row) => [...row.cells].reverse());
    const body = rows.filter((row) => row.some((cell) => cell.tagName === "TD"));
    const head = rows.filter((row) => !body.includes(row));
    for (let column = 0; column < Math.max(0, ...body.map((row) => row.length)); column += 1) {
      const cells = body.map((row) => row[column]).filter((cell) => cell?.tagName === "TD");
      const words = cells.filter((cell) => /^[A-Za-z]{3}/.test(cell.textContent.trim()));
      if (!cells.length || words.length < cells.length / 2) continue;
      for (const cell of [...cells, head.at(-1)?.[column]]) cell?.classList.add("names");
    }
  }
});
