// Maps on photos. Colour stands for the map alone: under it the photo is grey. What the model did not see is dark and striped.

let unfinished = 0; // drawings under way: the page stands still when there are none

/** Returns an asynchronous task that counts as unfinished until it ends. */
function counted(task) {
  return (...given) => {
    unfinished += 1;
    return task(...given).finally(() => (unfinished -= 1));
  };
}

/** Returns the range that the colours of a map cover; about zero where it has both signs. */
function scaleOf(map) {
  const signed = map.low < 0 && map.high > 0;
  const most = Math.max(Math.abs(map.low), Math.abs(map.high));
  const low = signed ? -most : map.low;
  const high = signed ? most : map.high;
  const flat = high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high));
  return { low, high, signed, flat };
}

/** Returns the colours of a scale, 256 times red, green, blue. */
function coloursOf(scale, kind = "heat") {
  return report.colours[scale.signed ? "signed" : kind][1];
}

/** Returns the size in pixels at which a photo fits into a box; a large photo grows to twice its own, a small one more. */
function fitted(photo, width, height) {
  const [rows, columns] = photo.shown;
  const share = Math.min(width / columns, height / rows, Math.max(2, 420 / Math.max(rows, columns)));
  return [Math.max(1, Math.round(columns * share)), Math.max(1, Math.round(rows * share))];
}

/**
 * Draws a photo and a map on it.
 * @param given {values, grid, low, high}, or null for the bare photo; or a promise of these.
 * @param options strength 0 to 1, kind of colours, smooth (between cells) or not, scale (the map's own where left out).
 */
async function drawMap(canvas, photo, given, { strength = 0.6, kind = "heat", smooth = true, scale = null } = {}) {
  const turn = (canvas.turn = (canvas.turn ?? 0) + 1);
  const [image, map] = await Promise.all([pictureOf(photo), given]);
  if (canvas.turn !== turn) return false; // something newer is drawn
  const { width, height } = canvas;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, width, height);
  if (map === null || strength === 0) return true;
  const pixels = context.getImageData(0, 0, width, height);
  paint(pixels, photo.place, map, { strength, colours: coloursOf(scale ?? scaleOf(map), kind), smooth, scale: scale ?? scaleOf(map) });
  context.putImageData(pixels, 0, 0);
  return true;
}

function paint(pixels, place, map, { strength, colours, smooth, scale }) {
  const { data, width, height } = pixels;
  const [a, b, c, d, e, f] = place;
  const [rows, columns] = map.grid;
  const values = map.values;
  const range = scale.high - scale.low;
  const keep = 1 - strength;
  for (let y = 0; y < height; y++) {
    const t = (y + 0.5) / height;
    for (let x = 0; x < width; x++) {
      const s = (x + 0.5) / width;
      const u = a * s + b * t + c;
      const v = d * s + e * t + f;
      const at = (y * width + x) * 4;
      const grey = 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];
      if (u < 0 || v < 0 || u >= 1 || v >= 1) {
        const dark = (x + y) % 12 < 3 ? grey * 0.2 + 75 : grey * 0.4;
        data[at] = data[at + 1] = data[at + 2] = dark;
        continue;
      }
      let value;
      if (smooth) {
        const column = Math.min(Math.max(u * columns - 0.5, 0), columns - 1);
        const row = Math.min(Math.max(v * rows - 0.5, 0), rows - 1);
        const c0 = Math.floor(column), r0 = Math.floor(row);
        const c1 = Math.min(c0 + 1, columns - 1), r1 = Math.min(r0 + 1, rows - 1);
        const right = column - c0, down = row - r0;
        const above = values[r0 * columns + c0] * (1 - right) + values[r0 * columns + c1] * right;
        const below = values[r1 * columns + c0] * (1 - right) + values[r1 * columns + c1] * right;
        value = above * (1 - down) + below * down;
      } else {
        value = values[Math.floor(v * rows) * columns + Math.floor(u * columns)];
      }
      const share = scale.flat ? 0.5 : Math.min(Math.max((value - scale.low) / range, 0), 1);
      const step = Math.round(share * 255) * 3;
      data[at] = grey * keep + colours[step] * strength;
      data[at + 1] = grey * keep + colours[step + 1] * strength;
      data[at + 2] = grey * keep + colours[step + 2] * strength;
    }
  }
}

/** Draws values of a grid as squares, one pixel each. */
function drawCells(canvas, values, [rows, columns], scale, kind) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  const colours = coloursOf(scale, kind);
  for (let i = 0; i < rows * columns; i++) {
    const share = scale.flat ? 0.5 : Math.min(Math.max((values[i] - scale.low) / (scale.high - scale.low), 0), 1);
    const step = Math.round(share * 255) * 3;
    pixels.data.set([colours[step], colours[step + 1], colours[step + 2], 255], i * 4);
  }
  context.putImageData(pixels, 0, 0);
}

/** Fills a place with a colour bar, both ends, and what the colours mean in words. */
function showScale(place, scale, words, kind = "heat", ends = endsOf(scale.low, scale.high)) {
  const [low, high] = ends;
  const bar = element("canvas", { width: 256, height: 1, role: "img", "aria-label": `colours from ${low} to ${high}` });
  drawCells(bar, Array.from({ length: 256 }, (_, i) => i / 255), [1, 256], { low: 0, high: 1, flat: false, signed: scale.signed }, kind);
  const ramp = scale.flat ? [`constant ${short(scale.low)}`] : [low, bar, high];
  place.replaceChildren(element("span", { className: "ramp" }, ...ramp), element("span", {}, words));
}

function rangeOf(values, count = values.length) {
  let low = Infinity, high = -Infinity;
  for (let i = 0; i < count; i++) {
    if (values[i] < low) low = values[i];
    if (values[i] > high) high = values[i];
  }
  return { low, high };
}
