// Order of search results: the first page and tutorials before methods and reports, these before the rest.
var Scorer = {
  score: ([docname, title, anchor, description, score]) => {
    const first = [/^(index|tutorials\/)/, /^(zoo|05_methods\/|reports\/)/].findIndex((place) => place.test(docname));
    return score + [0, 20, 5][first < 0 ? 0 : first + 1];
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 40,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
