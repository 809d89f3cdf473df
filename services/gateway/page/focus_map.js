/** Focus maps of an answer (docs/serving.md, "Focus maps"): decoded, and told in words. */

import { count } from "./dom.js";

function floats(base64) {
  const raw = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(raw.buffer), numbers = new Float32Array(raw.length / 4);
  for (let i = 0; i < numbers.length; i++) numbers[i] = view.getFloat32(4 * i, true);
  return numbers;
}

/**
 * A map as it came -> {width, height, regions, tokens, all, kept}: the last two count every token. A token has its box (x0, y0, x1, y1) in pixels of the image,
 * `base` for the overview tile's, `kept`, and `heat`: its importance as a share of the largest one's, or null.
 * Newlines have no place in the image, and are not among the tokens.
 */
export function decoded(map) {
  const boxes = floats(map.boxes), importance = map.importance ? floats(map.importance) : null, tokens = [];
  for (let i = 0; i < map.kept.length; i++) {
    const [x0, y0, x1, y1] = boxes.subarray(4 * i, 4 * i + 4);
    if (x1 <= x0 || y1 <= y0) continue;
    const base = i < map.base_tokens;
    tokens.push({ x0, y0, x1, y1, base, kept: map.kept[i] === "1", importance: importance?.[i] ?? null });
  }
  const most = tokens.reduce((largest, token) => Math.max(largest, token.importance ?? 0), 0);
  for (const token of tokens) token.heat = token.importance === null || !most ? null : token.importance / most;
  const kept = map.kept.replaceAll("0", "").length;
  return { width: map.width, height: map.height, regions: regions(map.regions), tokens, all: map.kept.length, kept };
}

function regions(found) {
  if (!found) return null;
  const columns = found.x.length - 1;
  const kernels = found.kernels.map(([height, width]) => ({ height, width, regions: 0 }));
  const cells = found.branches.map((branch, i) => {
    const row = Math.floor(i / columns), column = i % columns;
    kernels[branch].regions++;
    return { branch, x0: found.x[column], y0: found.y[row], x1: found.x[column + 1], y1: found.y[row + 1] };
  });
  return { kernels, cells };
}

/** What became of a region, as in "2x2, 1 token of 4". */
export function kernelName({ height, width }) {
  if (!height || !width) return "dropped";
  return `${height}\u00d7${width}, ${height * width > 1 ? `1 token of ${height * width}` : "full detail"}`;
}

/** The map for somebody who cannot see it. */
export function inWords(map) {
  const said = [];
  if (map.regions) {
    const all = map.regions.cells.length;
    const each = map.regions.kernels.map((kernel) => `${count(kernel.regions)} at ${kernelName(kernel)}`);
    said.push(`${count(all)} regions: ${each.join("; ")}.`);
  }
  if (map.kept === map.all) return [...said, `All ${count(map.all)} tokens were kept.`].join(" ");
  said.push(`${count(map.kept)} of ${count(map.all)} tokens were kept.`);
  const best = map.tokens.filter((token) => !token.base).sort((a, b) => b.heat - a.heat)[0];
  if (best?.heat != null) said.push(`Most important: ${place(best, map)}.`);
  return said.join(" ");
}

function place(token, map) {
  const across = ["left", "centre", "right"][third((token.x0 + token.x1) / 2 / map.width)];
  const down = ["top", "middle", "bottom"][third((token.y0 + token.y1) / 2 / map.height)];
  return `${down} ${across}`;
}

const third = (share) => Math.min(2, Math.floor(3 * share));
