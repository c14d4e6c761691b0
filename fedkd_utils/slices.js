// The pictures of the slice viewer: plain canvas, no library. viewer.py puts this file before viewer.js.
// Voxels are indexed (LR, AP, SI), the last axis fastest; a picture's columns and rows run against its two axes.

const rgb = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

/** One picture: where it is cut, and how its pixels find their voxels. */
class Cut {
  constructor(facts, plane, position, closeup) {
    const [axis, across, down, letters] = facts.planes[plane];
    const strides = [facts.shape[1] * facts.shape[2], facts.shape[2], 1];
    const ends = closeup ? facts.closeup : facts.shape.map((n) => [0, n]);
    Object.assign(this, { axis, across, down, letters });
    [this.left, this.top] = [ends[across][1] - 1, ends[down][1] - 1]; // voxels of the first column and row
    [this.columns, this.rows] = [ends[across][1] - ends[across][0], ends[down][1] - ends[down][0]];
    this.start = position[axis] * strides[axis] + this.left * strides[across] + this.top * strides[down];
    [this.right, this.below] = [strides[across], strides[down]];
    [this.width_mm, this.height_mm] = [this.columns * facts.spacing[across], this.rows * facts.spacing[down]];
  }
}

// Femoral outlines are whole, tibial and patellar ones broken, so that colour is not needed: whether pixel (x, y) stays.
const DASHES = [() => false, () => true, (x, y) => (x + 2 * y) % 13 > 3, (x, y) => (x + 2 * y) % 7 > 3];

// What is drawn but not true is strewn with plus signs, what is true but not drawn with rings: on a tile of 9 x 9.
const MARKS = [
  (x, y) => (x === 4 && y > 0 && y < 8) || (y === 4 && x > 0 && x < 8),
  (x, y) => Math.abs(Math.hypot(x - 4, y - 4) - 2.8) < 0.7,
];

/** A colour as the four bytes of a pixel. */
const pixel = ([red, green, blue], alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** Draws slices and what lies on them; get(name) gives a setting such as "window". */
class Painter {
  constructor(facts, voxels, get) {
    Object.assign(this, { facts, voxels, get });
    this.canvas = new OffscreenCanvas(1, 1);
    this.grey = new Uint32Array(65536); // the pixel of every voxel value
    this.window = [];
  }

  /** Fills a picture of the given size and draws it over a canvas. */
  paint(context, width, height, fill) {
    [this.canvas.width, this.canvas.height] = [width, height];
    const pen = this.canvas.getContext("2d", { willReadFrequently: true });
    const data = pen.createImageData(width, height);
    fill(new Uint32Array(data.data.buffer));
    pen.putImageData(data, 0, 0);
    context.drawImage(this.canvas, 0, 0, context.canvas.width, context.canvas.height);
  }

  /** The slice itself, every voxel a pixel, smoothed by the browser. */
  paintGrey(context, cut) {
    const [black, white] = this.get("window");
    if (this.window[0] !== black || this.window[1] !== white) {
      const [low, step] = this.facts.scale;
      const span = Math.max(white - black, 1e-9);
      for (let value = 0; value < 65536; value++) {
        const level = Math.min(Math.max((255 * (low + value * step - black)) / span, 0), 255);
        this.grey[value] = pixel([level, level, level], 255);
      }
      this.window = [black, white];
    }
    const { voxels, grey } = this;
    context.imageSmoothingEnabled = true;
    this.paint(context, cut.columns, cut.rows, (pixels) => {
      for (let row = 0, k = 0; row < cut.rows; row++) {
        let voxel = cut.start - row * cut.below;
        for (let column = 0; column < cut.columns; column++, k++, voxel -= cut.right) pixels[k] = grey[voxels[voxel]];
      }
    });
  }

  /** Labels, filled or as outlines, and their errors when there is a truth; at the resolution of the screen. */
  paintLabel(context, cut, label, truth) {
    const { width, height } = context.canvas;
    const shown = [false, ...this.facts.classes.map(([name]) => this.get("shown").includes(name))];
    const colours = ["#000000", ...this.facts.classes.map(([, colour]) => colour)].map(rgb);
    const opacity = this.get("opacity");
    const fills = colours.map((colour) => pixel(colour, Math.round(255 * opacity)));
    const lines = colours.map((colour) => pixel(colour, opacity > 0 ? 255 : 0));
    const outlined = truth || this.get("outline");
    const errors = this.facts.errors.map(([, colour]) => [pixel(rgb(colour), 90), pixel(rgb(colour), 255)]);
    const thick = Math.max(Math.round(1.5 * devicePixelRatio), 1);
    const across = Int32Array.from({ length: width }, (_, x) => cut.right * Math.floor(((x + 0.5) * cut.columns) / width));
    const down = Int32Array.from({ length: height }, (_, y) => cut.below * Math.floor(((y + 0.5) * cut.rows) / height));
    const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : label[cut.start - across[x] - down[y]]);
    context.imageSmoothingEnabled = false;
    this.paint(context, width, height, (pixels) => {
      for (let y = 0, k = 0; y < height; y++) {
        for (let x = 0; x < width; x++, k++) {
          const voxel = cut.start - across[x] - down[y];
          const own = label[voxel];
          if (truth && own !== truth[voxel] && shown[own || truth[voxel]]) {
            const kind = own ? 0 : 1;
            const tile = devicePixelRatio < 1.5 ? [x % 9, y % 9] : [(x >> 1) % 9, (y >> 1) % 9];
            pixels[k] = errors[kind][MARKS[kind](...tile) ? 1 : 0];
          }
          if (!shown[own]) continue;
          if (!outlined) {
            pixels[k] = fills[own];
          } else if (DASHES[own](x, y)) {
            const edge =
              at(x - thick, y) !== own || at(x + thick, y) !== own || at(x, y - thick) !== own || at(x, y + thick) !== own;
            if (edge) pixels[k] = lines[own];
          }
        }
      }
    });
  }

  annotate(context, cut, position) {
    const { width: w, height: h } = context.canvas;
    const size = 12 * devicePixelRatio;
    if (this.get("crosshair")) {
      const x = ((cut.left + 0.5 - position[cut.across]) / cut.columns) * w;
      const y = ((cut.top + 0.5 - position[cut.down]) / cut.rows) * h;
      context.beginPath();
      for (const [x0, y0, x1, y1] of [[0, y, x - size / 2, y], [x + size / 2, y, w, y], [x, 0, x, y - size / 2], [x, y + size / 2, x, h]]) {
        context.moveTo(x0, y0);
        context.lineTo(x1, y1);
      }
      [context.strokeStyle, context.lineWidth] = ["#ffff88aa", devicePixelRatio];
      context.stroke();
    }
    context.font = `600 ${size}px sans-serif`;
    [context.strokeStyle, context.fillStyle, context.lineWidth] = ["#000", "#ffffa0", 3 * devicePixelRatio];
    [context.textAlign, context.textBaseline] = ["center", "middle"];
    const places = [[0.7 * size, h / 2], [w - 0.7 * size, h / 2], [w / 2, 0.8 * size], [w / 2, h - 0.8 * size]];
    [...cut.letters].forEach((letter, i) => {
      context.strokeText(letter, ...places[i]);
      context.fillText(letter, ...places[i]);
    });
    const bar = (20 / cut.width_mm) * w;
    for (const [style, thick] of [["#000", 4], ["#ffffa0", 2]]) {
      [context.strokeStyle, context.lineWidth] = [style, thick * devicePixelRatio];
      context.beginPath();
      context.moveTo(0.5 * size, h - 0.5 * size);
      context.lineTo(0.5 * size + bar, h - 0.5 * size);
      context.stroke();
    }
    context.textAlign = "left";
    [context.strokeStyle, context.lineWidth] = ["#000", 3 * devicePixelRatio];
    context.strokeText("20 mm", 0.5 * size, h - 1.3 * size);
    context.fillText("20 mm", 0.5 * size, h - 1.3 * size);
  }
}
