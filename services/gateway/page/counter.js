/** The accounting of an answer: from all visual tokens to those that were kept, and what that saved. */

import { bytes, count, duration, el, percent, rate, svg } from "./dom.js";

/** Parts for an answer's `focus` and `tokensPerSecond` (null: too short to say). */
export function counterParts(focus, tokensPerSecond) {
  const { visual_tokens_uncompressed: full, visual_tokens_sampled: merged, visual_tokens_kept: kept } = focus;
  if (!full) return [el("p", { class: "small", text: "This question had no image." }), facts(focus, tokensPerSecond)];
  return [
    el("div", { class: "steps" },
      step(full, "full", "every visual token of the image", "full"),
      step(merged, "merged", merged < full ? `${percent(merged / full)} once plain regions are merged` : "no region was merged", "merged"),
      step(kept, "kept", kept < merged ? `${percent(kept / full)} that the question needs` : "none was dropped", "kept")),
    chart(focus),
    el("p", { class: "converted" }, el("b", { text: percent(focus.converted_share_percent / 100) }), ` converted: ${explained(focus)}`),
    facts(focus, tokensPerSecond),
  ];
}

function step(number, name, words, kind) {
  return el("div", { class: `step ${kind}` },
    el("span", { class: "number", text: count(number) }), el("span", { class: "name", text: name }),
    el("span", { class: "words", text: words }));
}

function prunes(focus) {
  return focus.visual_tokens_kept < focus.visual_tokens_sampled && focus.prune_layer > 0;
}

function explained(focus) {
  const { prune_layer: layer, num_layers: layers } = focus;
  if (!prunes(focus)) return `the share of the full tokens that all ${layers} layers worked on.`;
  return `the share of the full tokens that the layers worked on, on average. ${range(1, layer)} saw the merged ` +
         `tokens, ${range(layer + 1, layers).toLowerCase()} only the kept ones.`;
}

const range = (first, last) => (first === last ? `Layer ${first}` : `Layers ${first}\u2013${last}`);

/** Tokens (height) by layer (width): the outline is the full model, the area what was computed. */
function chart(focus) {
  const { visual_tokens_uncompressed: full, visual_tokens_sampled: merged, visual_tokens_kept: kept } = focus;
  const layers = focus.num_layers, first = prunes(focus) ? focus.prune_layer : layers;
  const bar = (x, width, tokens, kind) => {
    const height = Math.max(1.5, (100 * tokens) / full);
    const from = (100 * x) / layers, wide = (100 * width) / layers;
    return svg("rect", { class: kind, x: from, y: 100 - height, width: wide, height });
  };
  const lines = Array.from({ length: layers - 1 }, (_, i) =>
    svg("line", { x1: (100 * (i + 1)) / layers, x2: (100 * (i + 1)) / layers, y1: 0, y2: 100 }));
  const parts = [svg("rect", { class: "full", x: 0, y: 0, width: 100, height: 100 }), bar(0, first, merged, "merged")];
  if (first < layers) parts.push(bar(first, layers - first, kept, "kept"));
  const drawing = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" }, ...parts, ...lines);
  return el("div", { class: "chart" }, drawing,
    el("div", { class: "axis", "aria-hidden": "true" }, el("span", { text: "first layer" }), el("span", { text: "last layer" })));
}

function facts(focus, tokensPerSecond) {
  const saved = focus.kv_unpruned_bytes - focus.kv_bytes;
  const share = focus.kv_unpruned_bytes ? ` (${percent(saved / focus.kv_unpruned_bytes)})` : "";
  const kv = saved > 0 ? `${bytes(saved)}${share}` : "nothing";
  const fact = (name, value) => el("div", {}, el("dt", { text: name }), el("dd", { text: value }));
  return el("dl", { class: "facts" },
    fact("First token", duration(focus.time_to_first_token_ms)),
    fact("Speed", tokensPerSecond === null ? "\u2013" : `${rate(tokensPerSecond)} tokens/s`),
    fact("KV cache saved", kv));
}
