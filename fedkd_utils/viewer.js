// The slice viewer of viewer.py, in the browser: controls, keys and mouse. slices.js, which stands before it, draws.

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

/** JupyterLab's shortcuts are off while this has the focus: the arrow keys move a slider. */
const keepKeys = (made) => (made.dataset.lmSuppressShortcuts = "true");

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
  root.append(element("div", { className: "title", textContent: facts.title }), first, second, third, panels, readout, hint);
  root.querySelectorAll("input, select, button").forEach(keepKeys);
  el.append(root);

  // ---------------------------------------------------------------------------------------------------- pictures
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

  const painter = new Painter(facts, voxels, (name) => model.get(name));
  const canvases = [];
  function layout(pictures, cuts) {
    while (canvases.length < pictures.length) {
      const canvas = element("canvas", { tabIndex: 0, role: "img" });
      keepKeys(canvas);
      const caption = element("figcaption");
      panels.append(element("figure", {}, caption, canvas));
      listen(canvas, canvases.length);
      canvases.push({ canvas, caption });
    }
    const room = Math.min(root.clientWidth || 900, 1200);
    const [widest, tallest] = [Math.max(...cuts.map((c) => c.width_mm)), Math.max(...cuts.map((c) => c.height_mm))];
    const tall = pictures.length === 1 ? 520 : 380;
    const total = cuts.reduce((sum, c) => sum + c.width_mm, 0);
    // Side by side when they are not too small so, otherwise in rows, alike in length, of at least 280 pixels each.
    const most = Math.max(Math.floor(room / 280), 1);
    const perRow = Math.ceil(pictures.length / Math.ceil(pictures.length / most));
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
      const context = canvases[i].canvas.getContext("2d", { willReadFrequently: true });
      painter.paintGrey(context, cuts[i]);
      if (index >= 0) painter.paintLabel(context, cuts[i], labels[index], errors ? labels[0] : null);
      painter.annotate(context, cuts[i], position);
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
