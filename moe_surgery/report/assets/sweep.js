// The index of a sweep: one table, sorted by its headings, with the figures of the chosen texts.
const variants = { by: null, down: false, all: false };

function showVariants() {
  const domain = D.domains[chosen("sweep-domain")];
  const figures = (v) => v.figures[domain] || null;
  const number = (name, key, show) => ({ name, value: (v) => v[key], show: (v) => show(v[key]), position: true });
  const bytes = (n) => (n >= 1e9 ? (n / 1e9).toFixed(2) + " GB" : n >= 1e6 ? (n / 1e6).toFixed(2) + " MB" : (n / 1e3).toFixed(2) + " kB");
  const quality = (name, key, show, position) => {
    const value = (v) => { const f = figures(v); return f === null || f[key] === undefined ? null : f[key]; };
    return { name, value, show: (v) => show(value(v)), position };
  };
  const four = (v) => (v === null ? "\u2013" : v.toFixed(4));
  const word = (name, key) => ({ name, words: true, value: (v) => v[key], show: (v) => v[key] });
  const columns = [
    { ...word("Variant", "name"), show: (v) => make("a", { href: encodeURIComponent(v.name) + "/" }, v.name) },
    word("Ranking", "ranking"), number("Experts", "experts", whole), number("Top-k", "top_k", whole), word("Stored as", "store"),
    number("Parameters", "parameters", whole), number("Active", "active", whole), number("Size", "bytes", bytes),
    number("Share", "share", (v) => percent(v, 0)),
  ];
  if (domain !== undefined) {
    columns.push(
      quality("KL", "kl", four, true), quality("Perplexity", "perplexity", figure, true),
      quality("Agreement", "agreement", (v) => percent(v)));
  }
  sortable(byId("variants"), columns, D.variants, variants);
}

onChange(["sweep-domain"], showVariants);
document.querySelectorAll(".controls").forEach((c) => { c.hidden = false; });
showVariants();
let short = false;
addEventListener("beforeprint", () => { short = !variants.all; variants.all = true; showVariants(); });
addEventListener("afterprint", () => { variants.all = !short; showVariants(); });
