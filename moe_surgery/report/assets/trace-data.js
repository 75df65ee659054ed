// Routes, unpacked as trace_pack.py describes them: per model experts and weights [layers][tokens][slots] in
// flat arrays, slots by expert number; `first` is the slot of the largest weight.
const T = D.texts.length, L = D.layers, E = D.experts, K = D.topK;
const NONE = 0xffff;  // an expert number that no expert has: an empty slot
const full = 0;

async function inflated(base64) {
  const packed = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpack(model) {
  const bytes = await inflated(model.routes), half = D.levels === 15;
  model.experts = new Uint16Array(L * T * K).fill(NONE);
  model.weights = new Float32Array(L * T * K);
  model.first = bytes.subarray(0, L * T);
  const routes = model.slots.reduce((sum, n) => sum + n * T, 0);
  const weightsAt = L * T;
  let at = weightsAt + (half ? (routes + 1) >> 1 : routes), route = 0;
  const share = Float32Array.from({ length: D.levels + 1 }, (_, i) => (i / D.levels) ** 2);
  for (let l = 0; l < L; l++)
    for (let t = 0; t < T; t++) {
      let expert = -1, i = (l * T + t) * K;
      for (let s = 0; s < model.slots[l]; s++, i++, route++) {
        while (bytes[at] === 255) { expert += 255; at++; }
        expert += bytes[at++] + 1;
        model.experts[i] = expert;
        const q = half ? (bytes[weightsAt + (route >> 1)] >> (route & 1 ? 4 : 0)) & 15 : bytes[weightsAt + route];
        model.weights[i] = share[q];
      }
    }
  delete model.routes;
  if (model.kept) {
    const kept = new Uint8Array(L * E);
    model.kept.forEach((hex, l) => {
      for (let e = 0; e < E; e++) kept[l * E + e] = (parseInt(hex.substr(2 * (e >> 3), 2), 16) >> (e & 7)) & 1;
    });
    model.kept = kept;
  }
}

// A token's experts in a layer, largest weight first: [{expert, weight}].
function chosenIn(model, l, t) {
  const from = (l * T + t) * K, list = [];
  for (let s = 0; s < model.slots[l]; s++) list.push({ expert: model.experts[from + s], weight: model.weights[from + s], s });
  const strongest = model.first[l * T + t];
  return list.sort((x, y) => (y.s === strongest) - (x.s === strongest) || y.weight - x.weight || x.expert - y.expert);
}

const strongestIn = (model, l, t) => model.experts[(l * T + t) * K + model.first[l * T + t]];

// The layers of "over all layers" or "one layer".
const range = (layer) => (layer < 0 ? [0, L] : [layer, layer + 1]);

// Per token, the share of the full model's weight on experts that a plan removes; mean of the layers.
function weightLost(plan, layer) {
  const kept = D.models[plan].kept, { experts, weights, slots } = D.models[full], lost = new Float32Array(T);
  const [from, to] = range(layer);
  for (let l = from; l < to; l++)
    for (let t = 0; t < T; t++) {
      const i = (l * T + t) * K;
      let all = 0, gone = 0;
      for (let s = 0; s < slots[l]; s++) {
        all += weights[i + s];
        if (!kept[l * E + experts[i + s]]) gone += weights[i + s];
      }
      if (gone) lost[t] += gone / all / (to - from);
    }
  return lost;
}

// Per token, the share of experts that two models have in common; mean of the layers.
function agreement(a, b, layer) {
  const x = D.models[a], y = D.models[b], shares = new Float32Array(T), [from, to] = range(layer);
  for (let l = from; l < to; l++) {
    const n = x.slots[l], m = y.slots[l], most = Math.max(n, m) * (to - from);
    for (let t = 0; t < T; t++) {
      const base = (l * T + t) * K;
      let i = 0, j = 0, common = 0;
      while (i < n && j < m) {
        const p = x.experts[base + i], q = y.experts[base + j];
        if (p === q) { common++; i++; j++; } else if (p < q) i++; else j++;
      }
      shares[t] += common / most;
    }
  }
  return shares;
}

// Per token, an expert's weight in a layer, -1 where it is not chosen.
function weightsOf(model, l, expert) {
  const { experts, weights, slots } = D.models[model], values = new Float32Array(T).fill(-1);
  for (let t = 0; t < T; t++)
    for (let i = (l * T + t) * K, end = i + slots[l]; i < end; i++) if (experts[i] === expert) values[t] = weights[i];
  return values;
}

// How many tokens choose each expert of a layer, and for how many it is the strongest.
function usesIn(model, l) {
  const { experts, slots } = D.models[model], chosenBy = new Uint32Array(E), strongest = new Uint32Array(E);
  for (let t = 0; t < T; t++) {
    const from = (l * T + t) * K;
    for (let i = from; i < from + slots[l]; i++) chosenBy[experts[i]]++;
    strongest[strongestIn(D.models[model], l, t)]++;
  }
  return { chosenBy, strongest };
}
