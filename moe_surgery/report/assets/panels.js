// Coverage and evaluation, redrawn when a control changes.
function showCoverage() {
  const domains = chosen("coverage-compare") === 1;
  const view = chosen("coverage-view"), metric = chosen("coverage-metric"), n = chosen("coverage-n");
  const kind = D.kinds[chosen("coverage-kind")];
  const crowded = domains && D.views.length > FEW;  // then the chosen domain stands out among grey lines
  byId("coverage-n-value").textContent = n;
  if (byId("coverage-view")) byId("coverage-view").closest("label").hidden = domains && !crowded;
  if (byId("coverage-metric")) byId("coverage-metric").closest("label").hidden = !domains;
  const lines = domains
    ? D.views.map((v, i) => ({ name: v.name, index: i, muted: crowded && i !== view && !v.all, both: coverageOf(kind, metric, i) }))
    : D.metrics.map((m, i) => ({ name: m, index: i, both: coverageOf(kind, i, view) }));
  const drawn = crowded ? [...lines.filter((l) => l.muted), ...lines.filter((l) => !l.muted).map((l, index) => ({ ...l, index }))] : lines;
  const every = Math.max(1, Math.floor(D.experts / 128));  // not more points than the eye can see
  const sampled = Array.from({ length: D.experts }, (_, i) => i).filter((i) => i % every === 0 || i === D.experts - 1);
  const chart = (title, which) => ({
    title, xLabel: "experts kept in each layer", yLabel: "share of " + (kind === "weight" ? "routing weight" : "routes"),
    x: [1, D.experts], y: [0, 1], percent: true, at: n,
    marks: domains ? [] : D.plans.map((p) => ({ name: p.name, x: p.experts, y: p.coverage[kind][view][which] })),
    series: drawn.map((l) => ({ name: l.name, index: l.index, muted: l.muted, points: sampled.map((i) => (
      { x: i + 1, y: l.both[which][i], title: () => `${l.name}, ${i + 1} experts: ${percent(l.both[which][i])}` })) })),
  });
  showPanels("coverage", [chart("Mean over layers", 0), chart("Worst layer", 1)]);
  byId("coverage-legend").replaceChildren(legend(drawn.filter((l) => !l.muted)), ...(crowded ? ["Grey: the other domains."] : []));
  const fewest = (values, share) => {
    const at = values.findIndex((v) => v >= share - 1e-5);
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
