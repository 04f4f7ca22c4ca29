// The curves of runs in a page: hover for values, drag to zoom, click the legend to hide a line.
// It draws what the kernel says and tells the kernel nothing, so a page works without one.

const HEIGHT = 340, LEFT = 62, RIGHT = 14, TOP = 12, BOTTOM = 42;
const STYLE = `
.llm-chart { position: relative; width: 100%; height: ${HEIGHT}px; font: 12px system-ui, sans-serif; user-select: none;
  color: var(--jp-ui-font-color1, var(--vscode-editor-foreground, CanvasText)); }
.llm-chart canvas { position: absolute; inset: 0; cursor: crosshair; }
.llm-chart canvas:focus-visible { outline: 1px solid currentColor; }
.llm-chart .legend { position: absolute; top: ${TOP}px; right: ${RIGHT}px; display: flex; flex-direction: column;
  align-items: flex-end; max-width: 60%; }
.llm-chart button { all: unset; cursor: pointer; padding: 1px 6px; }
.llm-chart button:focus-visible { outline: 1px solid currentColor; }
.llm-chart .legend button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
.llm-chart .whole { position: absolute; left: ${LEFT + 6}px; top: ${TOP}px; border: 1px solid; border-radius: 3px; }
.llm-chart .tip { position: absolute; pointer-events: none; padding: 4px 8px; border-radius: 4px; white-space: pre;
  background: #333; color: #fff; z-index: 1; }
.llm-chart [hidden] { display: none; }`;

const numbers = view => new Float64Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

const short = v => {
  const size = Math.abs(v);
  if (size && (size < 1e-3 || size >= 1e12)) return v.toExponential(1).replace("e+", "e");
  return new Intl.NumberFormat("en", size < 1e4 ? { maximumSignificantDigits: 5 }
    : { notation: "compact", maximumSignificantDigits: 4 }).format(v);
};

// Round values between two, about `most` of them
export function ticks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(n => n * power).find(s => s >= raw * (1 - 1e-9));
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

// The same on a logarithmic scale: 1, 2 and 5 of each power of ten, or its powers alone
export function logTicks(low, high, most) {
  const powers = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++) powers.push(10 ** p);
  const inside = leads => powers.flatMap(p => leads.map(n => Number((n * p).toPrecision(3))))
    .filter(v => v >= low && v <= high);
  const fine = inside([1, 2, 5]);
  if (fine.length < 3) return ticks(low, high, most);
  return fine.length <= 2 * most ? fine : inside([1]);
}

// The index of the point of rising `xs` nearest to `x`
export function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

// The lowest and the highest x and y of lines, as far as a zoom leaves them in sight
export function bounds(lines, log, zoom) {
  let [left, right] = zoom?.x ?? [Infinity, -Infinity], low = Infinity, high = -Infinity;
  if (!zoom) for (const { x } of lines.filter(line => line.x.length)) {
    left = Math.min(left, x[0]); right = Math.max(right, x[x.length - 1]);
  }
  for (const { x, y } of lines) for (let i = 0; i < y.length; i++) {
    if (!Number.isFinite(y[i]) || (log && y[i] <= 0) || x[i] < left || x[i] > right) continue;
    low = Math.min(low, y[i]); high = Math.max(high, y[i]);
  }
  if (!(left <= right)) [left, right] = [0, 1];
  if (left === right) [left, right] = [left - .5, right + .5];
  if (zoom?.y) return { left, right, low: zoom.y[0], high: zoom.y[1] };
  if (!(low <= high)) [low, high] = log ? [1, 10] : [0, 1];
  const room = log ? (high / low) ** .05 || 1 : (high - low) * .05;
  if (low === high) return { left, right, low: log ? low / 2 : low - (Math.abs(low) || 1) / 2,
    high: log ? high * 2 : high + (Math.abs(high) || 1) / 2 };
  return { left, right, low: log ? low / room : low - room, high: log ? high * room : high + room };
}

// Places on the canvas for values, and back
function scales({ left, right, low, high }, log, width) {
  const wide = width - LEFT - RIGHT, tall = HEIGHT - TOP - BOTTOM;
  const up = log ? Math.log : v => v, down = log ? Math.exp : v => v;
  return {
    x: v => LEFT + (v - left) / (right - left) * wide,
    y: v => TOP + (1 - (up(v) - up(low)) / (up(high) - up(low))) * tall,
    atX: p => left + (p - LEFT) / wide * (right - left),
    atY: p => down(up(low) + (1 - (p - TOP) / tall) * (up(high) - up(low))),
  };
}

function rule(pen, x0, y0, x1, y1) {
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
}

function star(pen, x, y, size) {
  pen.beginPath();
  for (let i = 0; i < 10; i++) {
    const reach = i % 2 ? size * .45 : size, angle = Math.PI * (i / 5 - .5);
    pen.lineTo(x + reach * Math.cos(angle), y + reach * Math.sin(angle));
  }
  pen.closePath();
  pen.fill();
}

function drawLine(pen, line, at, log) {
  pen.globalAlpha = line.style === "raw" ? .25 : 1;
  pen.strokeStyle = pen.fillStyle = line.colour;
  pen.lineWidth = 1.5;
  pen.setLineDash(line.style === "dots" ? [2, 3] : []);
  const there = i => Number.isFinite(line.y[i]) && !(log && line.y[i] <= 0);
  const points = Array.from(line.x.keys()).filter(there).map(i => [at.x(line.x[i]), at.y(line.y[i]), i]);
  if (line.style === "star") for (const [x, y] of points) star(pen, x, y, 8);
  else {
    pen.beginPath();
    for (const [x, y, i] of points) pen[i && there(i - 1) ? "lineTo" : "moveTo"](x, y);
    pen.stroke();
  }
  if (line.style === "dots" || points.length === 1) for (const [x, y] of points) {
    pen.beginPath();
    pen.arc(x, y, 3, 0, 7);
    pen.fill();
  }
  pen.globalAlpha = 1;
  pen.setLineDash([]);
}

function drawAxes(pen, content, box, at, width, ink) {
  const upright = (content.log ? logTicks : ticks)(box.low, box.high, 6);
  const flat = ticks(box.left, box.right, Math.max(2, width / 110));
  pen.lineWidth = 1;
  pen.strokeStyle = "rgba(128,128,128,.25)";
  pen.fillStyle = ink;
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const v of upright) {
    rule(pen, LEFT, at.y(v), width - RIGHT, at.y(v));
    pen.fillText(short(v), LEFT - 6, at.y(v));
  }
  pen.textAlign = "center";
  for (const v of flat) {
    rule(pen, at.x(v), TOP, at.x(v), HEIGHT - BOTTOM);
    pen.fillText(short(v), at.x(v), HEIGHT - BOTTOM + 11);
  }
  pen.fillText(content.across, (LEFT + width - RIGHT) / 2, HEIGHT - 10);
  pen.save();
  pen.translate(11, (TOP + HEIGHT - BOTTOM) / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText(content.up, 0, 0);
  pen.restore();
}

function element(tag, parent, properties = {}) {
  const made = document.createElement(tag);
  Object.assign(made, properties);
  parent.append(made);
  return made;
}

function render({ model, el }) {
  const root = element("div", el, { className: "llm-chart" });
  element("style", root, { textContent: STYLE });
  const canvas = element("canvas", root, { tabIndex: 0 }), legend = element("div", root, { className: "legend" });
  const tip = element("div", root, { className: "tip", hidden: true });
  const whole = element("button", root, { className: "whole", textContent: "whole curve", hidden: true });
  const hidden = new Set();
  let content = {}, lines = [], zoom = null, cursor = null, drag = null, at = null;
  const seen = () => lines.filter(line => !hidden.has(line.name));

  function read() {
    const before = content.view;
    content = model.get("content");
    lines = (content.lines ?? []).map(line => ({ ...line, x: numbers(line.x), y: numbers(line.y) }));
    if (content.view !== before) zoom = null;
    Object.assign(root, { lines, content });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${content.up} against ${content.across}`);
    legend.replaceChildren();
    for (const { name, colour, style } of lines) {
      if (style === "raw") continue;
      const sign = { star: "★", dots: "┅" }[style] ?? "━";
      const item = element("button", legend, { onclick: () => { hidden.delete(name) || hidden.add(name); read(); } });
      item.setAttribute("aria-pressed", !hidden.has(name));
      element("span", item, { textContent: `${sign} ` }).style.color = colour;
      item.append(name);
    }
    draw();
  }

  function draw() {
    const width = root.clientWidth, scale = window.devicePixelRatio || 1;
    if (!width) return;
    Object.assign(canvas, { width: width * scale, height: HEIGHT * scale });
    Object.assign(canvas.style, { width: `${width}px`, height: `${HEIGHT}px` });
    const pen = canvas.getContext("2d"), box = bounds(seen(), content.log, zoom), ink = getComputedStyle(root).color;
    pen.scale(scale, scale);
    at = scales(box, content.log, width);
    drawAxes(pen, content, box, at, width, ink);
    pen.save();
    pen.beginPath(); pen.rect(LEFT, TOP - 6, width - LEFT - RIGHT + 6, HEIGHT - TOP - BOTTOM + 12); pen.clip();
    pen.strokeStyle = "rgba(128,128,128,.8)";
    pen.setLineDash([5, 4]);
    for (const seam of content.seams ?? []) rule(pen, at.x(seam), TOP, at.x(seam), HEIGHT - BOTTOM);
    for (const line of seen()) drawLine(pen, line, at, content.log);
    if (drag) { pen.fillStyle = "rgba(128,128,128,.2)"; pen.fillRect(...rectangle()); }
    pen.restore();
    whole.hidden = !zoom;
    point(pen, ink, width);
  }

  // The values under the pointer, beside it
  function point(pen, ink, width) {
    const told = seen().filter(line => line.x.length && !["raw", "star"].includes(line.style));
    tip.hidden = cursor === null || drag !== null || !told.length;
    if (tip.hidden) return;
    const x = told[0].x[nearest(told[0].x, at.atX(cursor))], place = at.x(x);
    pen.strokeStyle = ink;
    pen.lineWidth = .5;
    rule(pen, place, TOP, place, HEIGHT - BOTTOM);
    tip.replaceChildren(`${content.across} ${new Intl.NumberFormat("en", { maximumFractionDigits: 2 }).format(x)}`);
    for (const line of told) {
      const i = nearest(line.x, x), where = line.x[i] === x ? "" : ` at ${short(line.x[i])}`;
      element("br", tip);
      element("span", tip, { textContent: "━ " }).style.color = line.colour;
      tip.append(`${line.name} ${Number(line.y[i].toPrecision(5))}${where}`);
    }
    tip.style.top = `${TOP + 4}px`;
    tip.style.left = place < width / 2 ? `${place + 12}px` : "";
    tip.style.right = place < width / 2 ? "" : `${width - place + 12}px`;
  }

  // What a drag has marked: all of the height when it went sideways
  function rectangle() {
    const flat = Math.abs(drag.y1 - drag.y0) < 20;
    const [x0, x1] = [drag.x0, drag.x1].sort((a, b) => a - b), [y0, y1] = [drag.y0, drag.y1].sort((a, b) => a - b);
    return flat ? [x0, TOP, x1 - x0, HEIGHT - TOP - BOTTOM] : [x0, y0, x1 - x0, y1 - y0];
  }

  function release() {
    const [x, y, wide, tall] = rectangle(), flat = Math.abs(drag.y1 - drag.y0) < 20;
    drag = null;
    if (wide > 8) zoom = { x: [at.atX(x), at.atX(x + wide)], y: flat ? null : [at.atY(y + tall), at.atY(y)] };
    draw();
  }

  function reset() { zoom = null; draw(); }

  canvas.onpointerdown = e => {
    drag = { x0: e.offsetX, y0: e.offsetY, x1: e.offsetX, y1: e.offsetY };
    canvas.setPointerCapture(e.pointerId);
  };
  canvas.onpointermove = e => {
    cursor = e.offsetX;
    if (drag) Object.assign(drag, { x1: e.offsetX, y1: e.offsetY });
    draw();
  };
  canvas.onpointerup = () => { if (drag) release(); };
  canvas.onpointerleave = () => { cursor = null; draw(); };
  canvas.ondblclick = whole.onclick = reset;
  canvas.onkeydown = e => {
    if (e.key === "Escape") { cursor = null; reset(); }
    if (e.key !== "ArrowLeft" && e.key !== "ArrowRight") return;
    e.preventDefault();
    e.stopPropagation();
    cursor = Math.min(Math.max((cursor ?? LEFT) + (e.key === "ArrowLeft" ? -8 : 8), LEFT), root.clientWidth - RIGHT);
    draw();
  };
  const sized = new ResizeObserver(draw), themed = new MutationObserver(draw);
  sized.observe(root);
  themed.observe(document.body, { attributes: true });
  model.on("change:content", read);
  read();
  return () => { sized.disconnect(); themed.disconnect(); model.off("change:content", read); };
}

export default { render };
