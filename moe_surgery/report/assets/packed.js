// Orders, scores and coverage, unpacked on first use and kept. report/packing.py describes the format.
const P = JSON.parse(byId("packed").textContent);
const CELLS = D.layers * D.experts;
const unpacked = new Map();

function once(key, make) {
  if (!unpacked.has(key)) unpacked.set(key, make());
  return unpacked.get(key);
}

function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

const floatsOf = (text) => new Float32Array(bytesOf(text).buffer);
const wordsOf = (text) => new Uint16Array(bytesOf(text).buffer);
const bitsFor = (n) => 32 - Math.clz32(n);

// The best experts of each layer, best first; [layers * D.listed].
function ordersOf(metric, view) {
  return once(`order ${metric} ${view}`, () => {
    const bytes = bytesOf(P.orders[metric][view]), result = new Uint16Array(D.layers * D.listed);
    const left = new Uint16Array(D.experts);  // experts not listed yet, ascending
    let at = 0;
    for (let layer = 0; layer < D.layers; layer++) {
      for (let e = 0; e < D.experts; e++) left[e] = e;
      let buffer = 0, held = 0;
      for (let k = 0; k < D.listed; k++) {
        const width = bitsFor(D.experts - 1 - k);
        while (held < width) {
          buffer = ((buffer & 0xffff) << 8) | bytes[at++];
          held += 8;
        }
        held -= width;
        const position = (buffer >> held) & ((1 << width) - 1);
        result[layer * D.listed + k] = left[position];
        left.copyWithin(position, position + 1, D.experts - k);
      }
    }
    return result;
  });
}

// Rank of every expert in its layer, 1 for the best; 0 for those that are not listed.
function ranksOf(metric, view) {
  return once(`rank ${metric} ${view}`, () => {
    const orders = ordersOf(metric, view), result = new Uint16Array(CELLS);
    for (let layer = 0; layer < D.layers; layer++)
      for (let k = 0; k < D.listed; k++) result[layer * D.experts + orders[layer * D.listed + k]] = k + 1;
    return result;
  });
}

// Score of every expert; not a number for those that are not listed. Of a ranking: E for the first, 1 for the last.
function scoresOf(metric, view) {
  return once(`score ${metric} ${view}`, () => {
    if (D.measured && !D.levels) return floatsOf(P.scores[metric][view]);
    const result = new Float32Array(CELLS).fill(NaN), orders = ordersOf(metric, view);
    if (!D.measured) return result.map((_, i) => D.experts + 1 - ranksOf(metric, view)[i]);
    const top = floatsOf(P.scores[metric][view][0]), way = bytesOf(P.scores[metric][view][1]);
    const rowBytes = Math.ceil((D.listed + D.levels) / 8);
    for (let layer = 0; layer < D.layers; layer++) {
      let at = 8 * layer * rowBytes, level = D.levels;
      for (let k = 0; k < D.listed; at++)
        if ((way[at >> 3] >> (7 - (at & 7))) & 1) result[layer * D.experts + orders[layer * D.listed + k++]] = (level / D.levels) ** 2 * top[layer];
        else level--;
    }
    return result;
  });
}

const peaksOf = (view) => once(`peak ${view}`, () => floatsOf(P.peak[view]));

// [mean over layers, worst layer] of the share in the n best experts, n from 1.
function coverageOf(kind, metric, view) {
  return once(`coverage ${kind} ${metric} ${view}`, () => {
    const both = Array.from(wordsOf(P.coverage[kind][metric][view]), (v) => v / 65535);
    return [both.slice(0, D.experts), both.slice(D.experts)];
  });
}

// 1 for each expert that the plan keeps; null without a plan.
function keptIn(plan) {
  if (!D.plans[plan]) return null;
  return once(`plan ${plan}`, () => {
    const bytes = bytesOf(D.plans[plan].kept), result = new Uint8Array(CELLS);
    for (let i = 0; i < CELLS; i++) result[i] = (bytes[i >> 3] >> (7 - (i & 7))) & 1;
    return result;
  });
}

// Unpacks the ranks while the page waits for its reader, a few milliseconds at a time; at once if there are few.
function unpackAhead(then) {
  const waiting = [];
  D.metrics.forEach((_, metric) => D.views.forEach((_, view) => waiting.push([metric, view])));
  const next = (until) => {
    while (waiting.length && performance.now() < until) ranksOf(...waiting.shift());
    if (waiting.length) setTimeout(() => next(performance.now() + 8), 4);
    else then();
  };
  if (waiting.length * CELLS < 100000) next(Infinity);
  else setTimeout(() => next(performance.now() + 8), 50);
}
