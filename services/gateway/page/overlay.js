/** Draws a focus map over its image. Colours are those of Okabe and Ito, told apart with any colour vision. */

/** A region's colour by its branch, finest first; the lines inside a region say the same without colour. */
export const BRANCH_COLOURS = ["#d55e00", "#f0e442", "#0072b2", "#009e73", "#cc79a7", "#56b4e9"];
const KEPT = "#ffd60a", VEIL = "rgba(12, 14, 20, 0.78)";
const HEAT = [[8, 8, 40], [84, 18, 110], [187, 55, 84], [249, 142, 9], [252, 255, 164]];

/** An importance's colour, dark blue over red to light yellow; `heat` is 0 to 1. */
function heatColour(heat) {
  const at = Math.sqrt(heat) * (HEAT.length - 1), low = Math.min(HEAT.length - 2, Math.floor(at));
  const mixed = HEAT[low].map((value, i) => Math.round(value + (at - low) * (HEAT[low + 1][i] - value)));
  return `rgba(${mixed.join(", ")}, 0.8)`;
}

/** The tokens that are drawn: both sets cover the image, so one at a time. Low detail has the overview's alone. */
export function drawnTokens(map, overview) {
  const details = map.tokens.filter((token) => !token.base);
  return overview || !details.length ? map.tokens.filter((token) => token.base) : details;
}

/** `layers`: {regions, kept, importance, dim, overview}, each true or false. Without a map the canvas is clear. */
export function draw(canvas, map, layers) {
  const context = canvas.getContext("2d"), scale = window.devicePixelRatio || 1;
  const { clientWidth, clientHeight } = canvas;
  canvas.width = Math.round(clientWidth * scale);
  canvas.height = Math.round(clientHeight * scale);
  if (!map) return;
  const x = canvas.width / map.width, y = canvas.height / map.height;
  const edges = ({ x0, y0, x1, y1 }) => {
    const left = Math.round(x0 * x), top = Math.round(y0 * y);
    return [left, top, Math.round(x1 * x) - left, Math.round(y1 * y) - top];
  };
  const outline = (box, colour, width) => {
    const [left, top, wide, high] = edges(box);
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(left + width / 2, top + width / 2, wide - width, high - width);
  };
  const tokens = drawnTokens(map, layers.overview), kept = tokens.filter((token) => token.kept);
  const dropped = kept.length < tokens.length;
  if (layers.dim && dropped) {
    context.fillStyle = VEIL;
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  if (dropped) for (const token of kept) context.clearRect(...edges(token));
  if (layers.importance) {
    for (const token of tokens) {
      if (token.heat === null) continue;
      context.fillStyle = heatColour(token.heat);
      context.fillRect(...edges(token));
    }
  }
  if (layers.regions && map.regions) {
    for (const region of map.regions.cells) {
      context.globalAlpha = 0.42;
      context.fillStyle = BRANCH_COLOURS[region.branch % BRANCH_COLOURS.length];
      context.fillRect(...edges(region));
      context.globalAlpha = 1;
    }
    for (const token of drawnTokens(map, false)) outline(token, "rgba(255, 255, 255, 0.7)", scale);
    for (const region of map.regions.cells) outline(region, "rgba(0, 0, 0, 0.75)", scale);
  }
  if (layers.kept && dropped) {
    for (const token of kept) outline(token, "rgba(255, 214, 10, 0.45)", scale / 2);
    context.drawImage(around(kept.map(edges), canvas, scale), 0, 0);
  }
}

/** The outline of all boxes together: each is drawn grown, then its inside is cleared. */
function around(boxes, { width, height }, scale) {
  const drawn = Object.assign(document.createElement("canvas"), { width, height }), context = drawn.getContext("2d");
  for (const [colour, grown] of [["rgb(0, 0, 0)", 3.5 * scale], [KEPT, 2.5 * scale]]) {
    context.fillStyle = colour;
    for (const [left, top, wide, high] of boxes) {
      context.fillRect(left - grown, top - grown, wide + 2 * grown, high + 2 * grown);
    }
  }
  for (const box of boxes) context.clearRect(...box);
  return drawn;
}
