// The slice viewer of viewer.py, in the browser: plain canvas, no library, nothing fetched.
// Voxels are indexed (LR, AP, SI), the last axis fastest; a picture's columns and rows run against its two axes.

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

async function unzipped(view) {
  const stream = new Blob([view]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

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
  /** Calls visit(column, row, voxel) for every pixel. */
  each(visit) {
    for (let row = 0; row < this.rows; row++) {
      let voxel = this.start - row * this.below;
      for (let column = 0; column < this.columns; column++, voxel -= this.right) visit(column, row, voxel);
    }
  }
}

async function render({ model, el }) {
  const facts = model.get("_facts");
  const raw = model.get("_voxels");
  const voxels = new Uint16Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.byteLength));
  const labels = await Promise.all(model.get("_labels").map(unzipped));
  const [low, step] = facts.scale;
  const top = low + 65535 * step;
  const initial = Object.fromEntries(
    ["position", "plane", "window", "opacity", "shown", "outline", "errors", "crosshair", "closeup"].map((k) => [k, model.get(k)]),
  );
  const store = (changes) => {
    for (const [key, value] of Object.entries(changes)) model.set(key, value);
    model.save_changes();
  };

  // ---------------------------------------------------------------------------------------------------- controls
  const refresh = []; // what brings a control up to date
  const slider = (text, name, min, max, step, get, put, say) => {
    const input = element("input", { type: "range", min, max, step, className: name, ariaLabel: text });
    const value = element("span", { className: "value" });
    input.addEventListener("input", () => put(Number(input.value)));
    refresh.push(() => {
      input.value = get();
      value.textContent = say(get());
    });
    return element("label", {}, text, input, value);
  };
  const box = (text, name, get, put, ...before) => {
    const input = element("input", { type: "checkbox", className: name });
    input.addEventListener("change", () => put(input.checked));
    refresh.push(() => (input.checked = get()));
    return element("label", {}, input, ...before, text);
  };
  const move = (axis, index) => {
    const position = [...model.get("position")];
    position[axis] = clamp(Math.round(index), 0, facts.shape[axis] - 1);
    store({ position });
  };
  const choice = element("select", { className: "plane", ariaLabel: "plane" });
  const planes = facts.compare ? Object.keys(facts.planes) : ["three planes", ...Object.keys(facts.planes)];
  choice.append(...planes.map((name) => element("option", {}, name)));
  choice.addEventListener("change", () => store({ plane: choice.value }));
  refresh.push(() => (choice.value = model.get("plane")));
  const toggleClass = (name, on) => {
    const others = facts.classes.map(([n]) => n).filter((n) => (n === name ? on : model.get("shown").includes(n)));
    store({ shown: others });
  };
  const setWindow = (level, width) => {
    const half = Math.max(width, step) / 2;
    store({ window: [level - half, level + half] });
  };
  const level = () => (model.get("window")[0] + model.get("window")[1]) / 2;
  const width = () => model.get("window")[1] - model.get("window")[0];
  const short = (x) => (Math.abs(x) >= 100 ? x.toFixed(0) : x.toPrecision(3));
  const fine = (top - low) / 500;
  const first = element(
    "div",
    { className: "controls" },
    choice,
    ...Object.entries(facts.planes).map(([name, [axis]]) =>
      slider(name, `slice-${axis}`, 0, facts.shape[axis] - 1, 1, () => model.get("position")[axis],
        (v) => move(axis, v), (v) => `${v + 1}/${facts.shape[axis]}`),
    ),
  );
  const second = element(
    "div",
    { className: "controls" },
    slider("level", "level", low, top, fine, level, (v) => setWindow(v, width()), short),
    slider("window", "width", fine, top - low, fine, width, (v) => setWindow(level(), v), short),
    box("crosshair", "crosshair", () => model.get("crosshair"), (crosshair) => store({ crosshair })),
  );
  const third = element("div", { className: "controls" });
  if (labels.length) {
    third.append(
      slider("labels", "opacity", 0, 1, 0.05, () => model.get("opacity"), (opacity) => store({ opacity }), (v) => `${Math.round(100 * v)} %`),
      ...facts.classes.map(([name, colour]) => {
        const swatch = element("span", { className: "swatch" });
        swatch.style.background = colour;
        return box(name, `class-${name}`, () => model.get("shown").includes(name), (on) => toggleClass(name, on), swatch);
      }),
      box("outline", "outline", () => model.get("outline"), (outline) => store({ outline })),
      box("close-up", "closeup", () => model.get("closeup"), (closeup) => store({ closeup })),
    );
  }
  if (facts.compare) {
    const [[drawn], [missed]] = facts.errors;
    third.append(box(`errors (+ ${drawn}, o ${missed})`, "errors", () => model.get("errors"), (errors) => store({ errors })));
  }
  const reset = element("button", { className: "reset", textContent: "reset" });
  reset.addEventListener("click", () => store(initial));
  second.append(reset);
  const panels = element("div", { className: "panels" });
  const readout = element("div", { className: "readout" });
  const keys = labels.length ? `, 1 2 3 classes, o outline, c close-up${facts.compare ? ", e errors" : ""}` : "";
  const hint = element("div", { className: "hint" });
  hint.textContent = `Click a picture, then: wheel or Page Up/Down slices, arrows crosshair, right-drag window and level${keys}, x crosshair, r reset.`;
  const root = element("div", { className: "fedkd-viewer" });
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab: the keys are ours while a picture has the focus
  root.append(element("div", { className: "title", textContent: facts.title }), first, second, third, panels, readout, hint);
  el.append(root);

  // ----------------------------------------------------------------------------------------------------- drawing
  const small = new OffscreenCanvas(1, 1); // a slice at its own resolution

  function paint(context, cut, colourOf, smooth) {
    [small.width, small.height] = [cut.columns, cut.rows];
    const pen = small.getContext("2d");
    const pixels = pen.createImageData(cut.columns, cut.rows);
    colourOf(pixels.data);
    pen.putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, context.canvas.width, context.canvas.height);
  }

  function paintGrey(context, cut) {
    const [black, white] = model.get("window");
    const gain = (255 * step) / Math.max(white - black, 1e-9);
    const offset = (255 * (low - black)) / Math.max(white - black, 1e-9);
    paint(context, cut, (data) => {
      let k = 0;
      cut.each((column, row, voxel) => {
        data[k] = data[k + 1] = data[k + 2] = voxels[voxel] * gain + offset;
        data[k + 3] = 255;
        k += 4;
      });
    }, true);
  }

  const visible = () => [false, ...facts.classes.map(([name]) => model.get("shown").includes(name))];

  function paintLabel(context, cut, label) {
    const alpha = 255 * model.get("opacity");
    const colours = [[0, 0, 0], ...facts.classes.map(([, colour]) => rgb(colour))];
    const on = visible();
    paint(context, cut, (data) => {
      let k = 0;
      cut.each((column, row, voxel) => {
        const c = label[voxel];
        if (on[c]) {
          [data[k], data[k + 1], data[k + 2]] = colours[c];
          data[k + 3] = alpha;
        }
        k += 4;
      });
    }, false);
  }

  // Femoral outlines are whole, tibial and patellar ones broken (a quarter, half), so that colour is not needed.
  const KEPT = [[], [0, 1, 2, 3], [1, 2, 3], [0, 1]];

  function outline(context, cut, label) {
    const on = visible();
    const paths = KEPT.map(() => new Path2D());
    const [sx, sy] = [context.canvas.width / cut.columns, context.canvas.height / cut.rows];
    const edge = (path, kept, x, y, dx, dy) => {
      if (!kept.includes((7 * x + 5 * y + 3 * dx) % 4)) return;
      path.moveTo(x * sx, y * sy);
      path.lineTo((x + dx) * sx, (y + dy) * sy);
    };
    cut.each((x, y, voxel) => {
      const c = label[voxel];
      if (!on[c]) return;
      if (x === 0 || label[voxel + cut.right] !== c) edge(paths[c], KEPT[c], x, y, 0, 1);
      if (x === cut.columns - 1 || label[voxel - cut.right] !== c) edge(paths[c], KEPT[c], x + 1, y, 0, 1);
      if (y === 0 || label[voxel + cut.below] !== c) edge(paths[c], KEPT[c], x, y, 1, 0);
      if (y === cut.rows - 1 || label[voxel - cut.below] !== c) edge(paths[c], KEPT[c], x, y + 1, 1, 0);
    });
    context.globalAlpha = model.get("opacity") > 0 ? 1 : 0;
    context.lineCap = "round";
    facts.classes.forEach(([, colour], i) => {
      for (const [style, size] of [["#000", 2.8], [colour, 1.6]]) {
        [context.strokeStyle, context.lineWidth] = [style, size * devicePixelRatio];
        context.stroke(paths[i + 1]);
      }
    });
    context.globalAlpha = 1;
  }

  /** A tile of plus signs or rings: the two kinds of error differ in form, not in colour alone. */
  function tile(context, colour, ring) {
    const side = Math.round(9 * devicePixelRatio);
    const made = new OffscreenCanvas(side, side);
    const pen = made.getContext("2d");
    [pen.strokeStyle, pen.lineWidth] = [colour, 1.5 * devicePixelRatio];
    pen.beginPath();
    if (ring) {
      pen.arc(side / 2, side / 2, 0.3 * side, 0, 2 * Math.PI);
    } else {
      pen.moveTo(0.15 * side, side / 2);
      pen.lineTo(0.85 * side, side / 2);
      pen.moveTo(side / 2, 0.15 * side);
      pen.lineTo(side / 2, 0.85 * side);
    }
    pen.stroke();
    return context.createPattern(made, "repeat");
  }

  function markErrors(context, cut, label, truth) {
    const on = visible();
    const paths = [new Path2D(), new Path2D()];
    const [sx, sy] = [context.canvas.width / cut.columns, context.canvas.height / cut.rows];
    cut.each((x, y, voxel) => {
      const [drawn, true_] = [label[voxel], truth[voxel]];
      if (drawn !== true_ && on[drawn || true_]) paths[drawn ? 0 : 1].rect(x * sx, y * sy, sx, sy);
    });
    paths.forEach((path, kind) => {
      const colour = facts.errors[kind][1];
      context.fillStyle = colour + "50";
      context.fill(path);
      context.fillStyle = tile(context, colour, kind === 1);
      context.fill(path);
    });
  }

  function annotate(context, cut, position) {
    const { width: w, height: h } = context.canvas;
    const size = 12 * devicePixelRatio;
    if (model.get("crosshair")) {
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

  function say(position) {
    const voxel = (position[0] * facts.shape[1] + position[1]) * facts.shape[2] + position[2];
    const mm = facts.affine.slice(0, 3).map((row) => row[0] * position[0] + row[1] * position[1] + row[2] * position[2] + row[3]);
    const place = mm.map((x, i) => `${["LR", "PA", "IS"][i][x < 0 ? 0 : 1]} ${Math.abs(x).toFixed(1)}`).join(" ");
    const classes = ["background", ...facts.classes.map(([name]) => name)];
    const marks = labels.map((label, i) => `${facts.layers[i]}: ${classes[label[voxel]]}`).join(" · ");
    readout.textContent = `${place} mm · voxel ${position.join(", ")} · value ${short(low + voxels[voxel] * step)}${marks && " · "}${marks}`;
  }

  /** The pictures to draw: [caption, plane, label or -1, with errors]. */
  function wanted() {
    const plane = model.get("plane");
    if (!facts.compare) {
      const chosen = plane === "three planes" ? Object.keys(facts.planes) : [plane];
      return chosen.map((name) => [name, name, labels.length ? 0 : -1, false]);
    }
    const shown = plane === "three planes" ? "sagittal" : plane;
    return [["image", shown, -1, false], ...facts.layers.map((name, i) => [name, shown, i, i > 0 && model.get("errors")])];
  }

  const canvases = [];
  function layout(pictures, cuts) {
    while (canvases.length < pictures.length) {
      const canvas = element("canvas", { tabIndex: 0, role: "img" });
      const caption = element("figcaption");
      panels.append(element("figure", {}, caption, canvas));
      listen(canvas, canvases.length);
      canvases.push({ canvas, caption });
    }
    const room = Math.min(root.clientWidth || 900, 1200);
    const [widest, tallest] = [Math.max(...cuts.map((c) => c.width_mm)), Math.max(...cuts.map((c) => c.height_mm))];
    const tall = pictures.length === 1 ? 520 : 380;
    const total = cuts.reduce((sum, c) => sum + c.width_mm, 0);
    // Side by side when they are not too small so, otherwise in rows of at least 320 pixels each.
    const perRow = Math.min(pictures.length, Math.max(Math.floor(room / 320), 1));
    const across = perRow === pictures.length ? total : perRow * widest;
    const scale = Math.min((room - 12 * perRow) / across, tall / tallest);
    canvases.forEach(({ canvas, caption }, i) => {
      canvas.parentElement.style.display = i < pictures.length ? "" : "none";
      if (i >= pictures.length) return;
      const [w, h] = [cuts[i].width_mm * scale, cuts[i].height_mm * scale].map((n) => Math.max(Math.round(n), 1));
      const [pw, ph] = [w, h].map((n) => Math.round(n * devicePixelRatio));
      if (canvas.width !== pw || canvas.height !== ph) [canvas.width, canvas.height] = [pw, ph];
      Object.assign(canvas.style, { width: `${w}px`, height: `${h}px` });
      caption.textContent = pictures[i][0];
      canvas.dataset.plane = pictures[i][1];
      canvas.ariaLabel = `${pictures[i][0]}, ${pictures[i][1]} slice ${model.get("position")[cuts[i].axis] + 1}`;
    });
  }

  function draw() {
    const position = model.get("position");
    const pictures = wanted();
    const cuts = pictures.map(([, plane]) => new Cut(facts, plane, position, model.get("closeup")));
    refresh.forEach((bring) => bring());
    layout(pictures, cuts);
    pictures.forEach(([, , index, errors], i) => {
      const context = canvases[i].canvas.getContext("2d");
      paintGrey(context, cuts[i]);
      if (index >= 0) {
        if (!model.get("outline") && !errors) paintLabel(context, cuts[i], labels[index]);
        if (errors) markErrors(context, cuts[i], labels[index], labels[0]);
        if (model.get("outline") || errors) outline(context, cuts[i], labels[index]);
      }
      annotate(context, cuts[i], position);
    });
    say(position);
  }

  // ------------------------------------------------------------------------------------------------------ events
  function listen(canvas, number) {
    const cut = () => new Cut(facts, wanted()[number][1], model.get("position"), model.get("closeup"));
    let wheel = 0;
    let grip = null;
    const aim = (event) => {
      const c = cut();
      const bounds = canvas.getBoundingClientRect();
      const position = [...model.get("position")];
      const u = clamp(Math.floor(((event.clientX - bounds.left - 2) / canvas.clientWidth) * c.columns), 0, c.columns - 1);
      const v = clamp(Math.floor(((event.clientY - bounds.top - 2) / canvas.clientHeight) * c.rows), 0, c.rows - 1);
      position[c.across] = c.left - u;
      position[c.down] = c.top - v;
      store({ position });
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.focus();
      canvas.setPointerCapture(event.pointerId);
      const windowing = event.button === 2 || event.shiftKey;
      grip = windowing ? { x: event.clientX, y: event.clientY, level: level(), width: width() } : "aim";
      if (!windowing) aim(event);
      event.preventDefault();
      event.stopPropagation();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (grip === "aim") aim(event);
      else if (grip) {
        const unit = (top - low) / 400;
        setWindow(grip.level + (grip.y - event.clientY) * unit, grip.width + (event.clientX - grip.x) * unit);
      }
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (grip = null));
    for (const name of ["mousedown", "contextmenu"]) {
      canvas.addEventListener(name, (event) => {
        event.preventDefault();
        event.stopPropagation(); // JupyterLab would take the focus, or open its menu
      });
    }
    canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== canvas) return; // a page scrolls past a picture that was not clicked
      event.preventDefault();
      wheel += event.deltaMode === 0 ? event.deltaY / 40 : event.deltaY;
      const steps = Math.trunc(wheel);
      if (!steps) return;
      wheel = 0;
      const { axis } = cut();
      move(axis, model.get("position")[axis] + clamp(steps, -1, 1));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const c = cut();
      const shift = (axis, by) => () => move(axis, model.get("position")[axis] + by);
      const flip = (name) => () => store({ [name]: !model.get(name) });
      const actions = {
        PageUp: shift(c.axis, -1), PageDown: shift(c.axis, 1),
        ArrowLeft: shift(c.across, 1), ArrowRight: shift(c.across, -1), ArrowUp: shift(c.down, 1), ArrowDown: shift(c.down, -1),
        o: flip("outline"), e: flip("errors"), x: flip("crosshair"), c: flip("closeup"), r: () => store(initial),
      };
      facts.classes.forEach(([name], i) => (actions[i + 1] = () => toggleClass(name, !model.get("shown").includes(name))));
      if (!actions[event.key]) return;
      event.preventDefault();
      event.stopPropagation();
      actions[event.key]();
    });
  }

  let planned = 0;
  const plan = () => {
    planned ||= requestAnimationFrame(() => {
      planned = 0;
      draw();
    });
  };
  draw();
  model.on("change", plan);
  const watcher = new ResizeObserver(plan);
  watcher.observe(root);
  return () => {
    watcher.disconnect();
    model.off("change", plan);
  };
}

export default { render };
