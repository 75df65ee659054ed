// Tables sorted by clicking their headings.
const ROWS_AT_ONCE = 40;

// columns: [{name, value: row -> number or string or null, show: row -> text, words: bool}]
function sortable(table, columns, rows, state) {
  const name = table.id;
  const show = () => {
    const sorted = [...rows];
    if (state.by !== null) {
      const value = columns[state.by].value, turn = state.down ? -1 : 1;
      sorted.sort((a, b) => {
        const x = value(a), y = value(b);
        if (x === null || y === null || x === "" || y === "") {  // rows without a value come last
          const missing = (v) => (v === null || v === "" ? 1 : 0);
          return missing(x) - missing(y);
        }
        return turn * (typeof x === "string" ? x.localeCompare(y) : x - y);
      });
    }
    const shown = state.all ? sorted : sorted.slice(0, ROWS_AT_ONCE);
    byId(name + "-more").hidden = shown.length === rows.length;
    byId(name + "-count").textContent = shown.length === rows.length ? "" :
      `${shown.length} of ${rows.length.toLocaleString("en")} rows shown`;
    const body = make("tbody", null, ...shown.map((row) => make("tr", null, ...columns.map((c, i) =>
      i === 0 ? make("th", { scope: "row" }, c.show(row)) : make("td", c.words ? { class: "words" } : null, c.show(row))))));
    [...head.cells].forEach((cell, i) =>
      cell.setAttribute("aria-sort", i !== state.by ? "none" : state.down ? "descending" : "ascending"));
    table.tBodies[0].replaceWith(body);
  };
  const head = make("tr", null, ...columns.map((c, i) => {
    const button = make("button", { type: "button" }, c.name);
    button.addEventListener("click", () => {
      // Best first; words and positions ascending.
      state.down = state.by === i ? !state.down : !c.words && !c.position;
      state.by = i;
      show();
    });
    return make("th", { scope: "col", class: c.words ? "words" : null }, button);
  }));
  table.replaceChildren(make("thead", null, head), make("tbody"));
  byId(name + "-more").onclick = () => { state.all = true; show(); };
  show();
}

const experts = { by: null, down: false, all: false };

function startExperts() {
  const box = byId("table-controls");
  box.append(choice("table-view", "Domain", D.views.map((v) => v.name)));
  box.append(choice("table-layer", "Layer", ["all", ...Array.from({ length: D.layers }, (_, i) => String(i))]));
  if (D.plans.length) {
    box.append(choice("table-plan", "Plan", D.plans.map((p) => p.name)));
    box.append(choice("table-kept", "Experts", ["all", "kept", "not kept"]));
  }
  onChange(["table-view", "table-layer", "table-plan", "table-kept"], showExperts);
  showExperts();
}

function showExperts() {
  const view = chosen("table-view"), only = chosen("table-layer") - 1, kept = keptSets(chosen("table-plan"));
  const wanted = chosen("table-kept");
  const rows = [];
  for (let i = 0; i < D.layers * D.experts; i++) {
    const layer = Math.floor(i / D.experts), expert = i % D.experts;
    if (only >= 0 && layer !== only) continue;
    if (kept && wanted && kept[layer].has(expert) !== (wanted === 1)) continue;
    rows.push({ i, layer, expert, stays: kept ? kept[layer].has(expert) : null });
  }
  const of = (name, values, show) => ({ name, value: (r) => values[r.i], show: (r) => show(values[r.i]) });
  const columns = [
    { name: "Layer", value: (r) => r.layer, show: (r) => String(r.layer), position: true },
    { name: "Expert", value: (r) => r.expert, show: (r) => String(r.expert), position: true },
    ...D.metrics.map((m, k) => of(m === "frequency" ? "frequency (count)" : m, D.scores[k][view], (v) => score(k, v))),
    of("peak |f|", D.peak[view], figure),
  ];
  if (kept) columns.splice(2, 0, { name: "Kept", words: true, value: (r) => (r.stays ? "a" : "b"), show: (r) => (r.stays ? "kept" : "\u2013") });
  sortable(byId("experts"), columns, rows, experts);
}

const models = { by: null, down: false, all: false };

function fillModels(e, domain) {
  const word = (name, at) => ({ name, words: true, value: (m) => m[at], show: (m) => m[at] });
  const count = (name, at) => ({ name, value: (m) => m[at], show: (m) => (m[at] === null ? "" : whole(m[at])), position: true });
  const quality = (name, at, show, position) => {
    const value = (m) => (m[6][domain] ? m[6][domain][at] : null);
    return { name, value, show: (m) => show(value(m)), position };
  };
  const four = (v) => (v === null ? "\u2013" : v.toFixed(4));
  const columns = [
    word("Model", 0), count("Experts", 2), count("Top-k", 3), word("Method", 4), word("Data or seed", 5),
    quality("Tokens", 0, whole), quality("Cross-entropy", 1, four, true),
    quality("Perplexity", 2, figure, true), quality("KL", 3, four, true), quality("Agreement", 4, (v) => percent(v)),
    quality("Rerouted", 5, (v) => percent(v), true),
  ];
  sortable(byId("models"), columns, e.models, models);
}
