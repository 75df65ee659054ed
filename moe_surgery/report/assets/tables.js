// Tables sorted by clicking their headings.
const ROWS_AT_ONCE = 40;

// More would make the page slow; they are shown page by page only.
const MOST_ROWS = 1600;

// Positions by ascending value, ties by position. Float32 bits in an order of integers, with the position behind them,
// fit a number's 53 bits; so the numbers sort without a comparison function, which takes long for many rows.
function inOrder(values) {
  const bits = new Uint32Array(values.buffer), behind = 2 ** 20;
  const joined = Float64Array.from(bits, (b, i) => ((b >>> 31 ? ~b : b | 0x80000000) >>> 0) * behind + i).sort();
  return joined.map((v) => v % behind);
}

// columns: [{name, value: row -> number or string or null, show: row -> text, words: bool}]
function sortable(table, columns, rows, state) {
  const name = table.id, size = state.rows || ROWS_AT_ONCE;
  let sorted = rows;
  state.from = 0;
  const sort = () => {
    sorted = rows;
    if (state.by === null) return;
    // Rows without a value come last.
    const turn = state.down ? -1 : 1, keys = rows.map(columns[state.by].value);
    const missing = (k) => k === null || k === "" || Number.isNaN(k);
    if (keys.some((k) => typeof k === "string")) {
      sorted = Array.from(rows, (_, i) => i).sort((a, b) => missing(keys[a]) - missing(keys[b]) || turn * keys[a].localeCompare(keys[b]))
        .map((i) => rows[i]);
      return;
    }
    sorted = Array.from(inOrder(Float32Array.from(keys, (k) => (missing(k) ? Infinity : turn * k))), (i) => rows[i]);
  };
  const show = () => {
    const all = state.all && rows.length <= MOST_ROWS, count = rows.length.toLocaleString("en");
    const shown = all ? sorted : sorted.slice(state.from, state.from + size), whole = shown.length === rows.length;
    byId(name + "-more").hidden = whole || rows.length > MOST_ROWS;
    byId(name + "-previous").hidden = byId(name + "-next").hidden = whole;
    byId(name + "-previous").disabled = state.from === 0;
    byId(name + "-next").disabled = state.from + size >= rows.length;
    byId(name + "-count").textContent = whole ? "" : `rows ${state.from + 1} to ${state.from + shown.length} of ${count}`;
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
      state.from = 0;
      sort();
      show();
    });
    return make("th", { scope: "col", class: c.words ? "words" : null }, button);
  }));
  table.replaceChildren(make("thead", null, head), make("tbody"));
  const turn = (by) => () => { state.from += by; show(); };
  byId(name + "-previous").onclick = turn(-size);
  byId(name + "-next").onclick = turn(size);
  byId(name + "-more").onclick = () => { state.all = true; show(); };
  sort();
  show();
}

const experts = { by: null, down: false, all: false };

function startExperts() {
  const box = byId("table-controls");
  if (D.measured && D.views.length > 1) box.append(choice("table-view", "Domain", D.views.map((v) => v.name)));
  box.append(choice("table-layer", "Layer", ["all", ...Array.from({ length: D.layers }, (_, i) => String(i))]));
  if (D.plans.length) {
    box.append(choice("table-plan", "Plan", D.plans.map((p) => p.name)));
    box.append(choice("table-kept", "Experts", ["all", "kept", "not kept"]));
  }
  onChange(["table-view", "table-layer", "table-plan", "table-kept"], showExperts);
  showExperts();
}

// The rows are numbers of cells. Of rankings, the columns are the expert's rank in each.
function showExperts() {
  const view = chosen("table-view"), only = chosen("table-layer") - 1, kept = keptIn(chosen("table-plan"));
  const wanted = chosen("table-kept"), rows = [];
  const [first, last] = only >= 0 ? [only * D.experts, (only + 1) * D.experts] : [0, CELLS];
  for (let i = first; i < last; i++) if (!kept || !wanted || kept[i] === (wanted === 1 ? 1 : 0)) rows.push(i);
  const of = (name, values, show) => ({ name, value: (i) => values[i], show: (i) => show(values[i]) });
  const numbers = D.measured
    ? D.metrics.map((m, k) => of(m === "frequency" && D.counts ? "frequency (count)" : m, scoresOf(k, view), (v) => score(k, v)))
    : D.views.map((v, k) => ({ ...of(v.name, ranksOf(0, k), String), position: true }));
  const columns = [
    { name: "Layer", value: (i) => Math.floor(i / D.experts), show: (i) => String(Math.floor(i / D.experts)), position: true },
    { name: "Expert", value: (i) => i % D.experts, show: (i) => String(i % D.experts), position: true },
    ...numbers,
  ];
  if (P.peak) columns.push(of("peak |f|", peaksOf(view), figure));
  if (kept) columns.splice(2, 0, { name: "Kept", words: true, value: (i) => (kept[i] ? "a" : "b"), show: (i) => (kept[i] ? "kept" : "\u2013") });
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
