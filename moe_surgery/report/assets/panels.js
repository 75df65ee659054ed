// Overlap, coverage and evaluation, redrawn when a control changes.
function pairOf(a, b) {
  const [low, high] = a < b ? [a, b] : [b, a];
  return (high * (high - 1)) / 2 + low;
}

function showOverlap() {
  const metric = chosen("overlap-metric"), n = chosen("overlap-n");
  byId("overlap-n-value").textContent = n;
  [...byId("overlap").tBodies[0].rows].forEach((row, a) => {
    D.views.forEach((_, b) => {
      const share = a === b ? 1 : D.overlap[metric][pairOf(a, b)][n - 1] / (n * D.layers);
      row.cells[b + 1].className = "q" + step(share);
      row.cells[b + 1].textContent = (100 * share).toFixed(0);
    });
  });
  byId("overlap-caption").textContent = `Percent. The best ${n} of ${D.experts} experts by ${D.metrics[metric]}; ` +
    `random choice would give ${((100 * n) / D.experts).toFixed(0)}.`;
}

function showCoverage() {
  const domains = chosen("coverage-compare") === 1;
  const view = chosen("coverage-view"), metric = chosen("coverage-metric"), n = chosen("coverage-n");
  const kind = chosen("coverage-kind") === 1 ? "routes" : "weight";
  byId("coverage-n-value").textContent = n;
  byId("coverage-view").closest("label").hidden = domains;
  if (byId("coverage-metric")) byId("coverage-metric").closest("label").hidden = !domains;
  const lines = domains
    ? D.views.map((v, i) => ({ name: v.name, index: i, both: D.coverage[kind][metric][i] }))
    : D.metrics.map((m, i) => ({ name: m, index: i, both: D.coverage[kind][i][view] }));
  const chart = (title, which) => ({
    title, xLabel: "experts kept in each layer", yLabel: "share of " + (kind === "weight" ? "routing weight" : "routes"),
    x: [1, D.experts], y: [0, 1], percent: true, at: n,
    marks: domains ? [] : D.plans.map((p) => ({ name: p.name, x: p.experts, y: p.coverage[kind][view][which] })),
    series: lines.map((l) => ({ name: l.name, index: l.index, points: l.both[which].map((y, i) => (
      { x: i + 1, y, title: `${l.name}, ${i + 1} experts: ${percent(y)}` })) })),
  });
  showPanels("coverage", [chart("Mean over layers", 0), chart("Worst layer", 1)]);
  byId("coverage-legend").replaceChildren(legend(lines));
  const fewest = (values, share) => {
    const at = values.findIndex((v) => v >= share - 1e-9);
    return at < 0 ? "\u2013" : String(at + 1);
  };
  const shares = [0.8, 0.9, 0.95, 0.99];
  const head = [domains ? "Domain" : "Metric", `best ${n} experts`, "in the worst layer",
    ...shares.map((s) => `for ${100 * s} %`)];
  byId("coverage-table").replaceChildren(
    make("caption", { class: "hint" }, "Share covered by the best " + n + " experts, and the fewest experts for a share (in brackets: in every layer)."),
    make("thead", null, make("tr", null, ...head.map((h) => make("th", { scope: "col" }, h)))),
    make("tbody", null, ...lines.map((l) => make("tr", null, make("th", { scope: "row" }, l.name),
      make("td", null, percent(l.both[0][n - 1])), make("td", null, percent(l.both[1][n - 1])),
      ...shares.map((s) => make("td", null, `${fewest(l.both[0], s)} (${fewest(l.both[1], s)})`))))));
}

const MEASURES = [
  ["kl", "KL divergence from the full model", "nats per token"],
  ["cross_entropy", "Cross-entropy", "nats per token"],
  ["agreement", "Same most likely token", "share of tokens"],
  ["rerouted", "Rerouted to another expert", "mean over layers"],
];
// More lines are hard to tell apart.
const FEW = 8;
const shownEvaluation = () => D.evaluations[chosen("evaluation-file")];

function startEvaluation() {
  const fresh = () => {
    const e = shownEvaluation();
    fillChoice("evaluation-domain", e.domains);
    fillChoice("evaluation-set", ["any domain", "the texts' domain", ...e.sets]);
    byId("evaluation-set").closest("label").hidden = e.sets.length < 2;
    byId("evaluation-set").value = e.lines.length > FEW && e.sets.length > 1 ? 1 : 0;
    const kl = e.lines.flatMap((l) => l.points.kl[0].map((p) => p[1]));
    byId("evaluation-log").checked = kl.length > 0 && Math.min(...kl) > 0 && Math.max(...kl) > 20 * Math.min(...kl);
    showEvaluation();
  };
  onChange(["evaluation-file"], fresh);
  onChange(["evaluation-domain", "evaluation-set", "evaluation-log"], showEvaluation);
  fresh();
}

function showEvaluation() {
  const e = shownEvaluation(), domain = chosen("evaluation-domain"), set = chosen("evaluation-set");
  const own = e.own[domain].length ? e.own[domain] : null;
  const wanted = set === 0 ? null : set === 1 ? own : [set - 2];
    // Colours are numbered among the lines shown, so that a few lines never look alike.
  const lines = e.lines.filter((l) => l.set === null || wanted === null || wanted.includes(l.set)).map((l, index) => ({ ...l, index }));
  const charts = MEASURES.map(([measure, title, yLabel]) => {
    const share = measure === "agreement" || measure === "rerouted";
    const series = lines.map((l) => ({ name: l.name, index: l.index, points: l.points[measure][domain].map(([x, y, low, high, models]) => (
      { x, y, low, high, title: `${l.name}, ${whole(x)} experts: ${share ? percent(y) : figure(y)}` +
        (models > 1 ? ` (median of ${models})` : "") })) }));
    const points = series.flatMap((s) => s.points), full = e.full[measure][domain];
    const values = points.flatMap((p) => [p.y, p.low, p.high]);
    const log = measure === "kl" && byId("evaluation-log").checked && values.length > 0 && Math.min(...values) > 0 &&
      Math.max(...values) > Math.min(...values);
    const low = Math.min(full, ...values), high = Math.max(full, ...values), margin = 0.06 * (high - low) || 0.05;
    return {
      title, yLabel, xLabel: "experts kept in each layer", log, percent: share, series,
      x: [Math.min(e.experts, ...points.map((p) => p.x)), e.experts],
      y: measure === "agreement" ? [0, 1] : log ? [Math.min(...values), Math.max(...values)] : [measure === "cross_entropy" ? low - margin : 0, high + margin],
      level: measure === "cross_entropy" ? { name: "full model", y: full } : null,
    };
  });
  showPanels("evaluation", charts);
  byId("evaluation-legend").replaceChildren(legend(lines));
  fillModels(e, domain);
}
