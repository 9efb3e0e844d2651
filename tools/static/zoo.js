// A click on a heading of a table of the class `sortable` sorts its rows.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const text = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          if (!text(a) || !text(b)) return Number(!text(a)) - Number(!text(b));
          const number = (row) => Number(row.cells[column].dataset.sort);
          const order = Number.isNaN(number(a)) || Number.isNaN(number(b))
            ? text(a).localeCompare(text(b), "en", { numeric: true }) : number(a) - number(b);
          return down ? -order : order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
});
