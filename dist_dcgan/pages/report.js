// Curves that can be zoomed, hidden and read off; grids as a film. Without it the page shows the same, at rest.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = data.frame;
  const NS = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);
  const [over, from, to] = ["over", "from", "to"].map(byId);
  const svgs = [...document.querySelectorAll("svg[data-panel]")];
  const hidden = svgs.map(() => new Set());
  const farthest = Math.max(1e-9, ...data.panels.flatMap((panel) => panel.curves.flatMap((curve) => curve.hours.slice(-1))));

  document.documentElement.classList.add("scripted");
  document.querySelectorAll(".control").forEach((control) => { control.hidden = false; });

  // Axes

  const whole = () => (over.value === "images" ? data.last : farthest);
  const range = () => {
    const ends = [from, to].map((input) => (whole() * input.value) / 1000).sort((a, b) => a - b);
    return ends[1] > ends[0] ? ends : [ends[0], ends[0] + whole() / 1000];
  };
  const label = (value) => {
    const [factor, letter] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([least]) => Math.abs(value) >= least) || [1, ""];
    return Math.abs(value) < 1e-12 ? "0" : Number((value / factor).toPrecision(4)) + letter;
  };
  const ticks = (low, high) => {
    const rough = (high - low) / 5;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * unit).find((each) => each >= rough);
    const found = [];
    for (let index = Math.ceil(low / step); index <= Math.floor(high / step); index++) found.push(index * step);
    return found;
  };
  const powers = (low, high) => {
    const found = [];
    for (let power = Math.max(-307, Math.ceil(low)); power <= Math.min(308, Math.floor(high)); power++) found.push(10 ** power);
    return found.filter((_, index) => index % Math.max(1, Math.floor(found.length / 4)) === 0);
  };
  const add = (parent, name, attributes, text) => {
    const element = parent.appendChild(document.createElementNS(NS, name));
    Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // One panel, as charts.py draws it, for the part that is asked for

  const scales = [];
  const draw = (index) => {
    const svg = svgs[index], panel = data.panels[index], [start, end] = range();
    const change = panel.log ? Math.log10 : Number;
    const curves = panel.curves.filter((_, place) => !hidden[index].has(place));
    let values = [];
    for (const curve of curves) {
      const xs = curve[over.value];
      values = values.concat(curve.y.filter((y, place) => y !== null && xs[place] >= start && xs[place] <= end));
    }
    if (!values.length) values = panel.log ? [1, 10] : [0, 1];
    let low = change(values.reduce((a, b) => Math.min(a, b))), high = change(values.reduce((a, b) => Math.max(a, b)));
    const room = 0.05 * (high - low) || 0.5 * Math.abs(high) || 1;
    low -= room;
    high += room;
    const x = (value) => LEFT + ((WIDTH - LEFT - RIGHT) * (value - start)) / (end - start);
    const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * (change(value) - low)) / (high - low);
    scales[index] = { x, start, end };

    const lines = svg.querySelector(".ticks");
    lines.replaceChildren();
    for (const tick of ticks(start, end)) {
      add(lines, "line", { x1: x(tick), x2: x(tick), y1: TOP, y2: HEIGHT - BOTTOM });
      add(lines, "text", { x: x(tick), y: HEIGHT - 8, "text-anchor": "middle" }, label(tick));
    }
    for (const tick of panel.log ? powers(low, high) : ticks(low, high)) {
      add(lines, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) });
      add(lines, "text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, label(tick));
    }
    const marks = svg.querySelector(".marks");
    marks.replaceChildren();
    for (const mark of data.marks) {
      const at = mark[over.value];
      if (at < start || at > end) continue;
      const line = add(marks, "line", { class: mark.kind, x1: x(at), x2: x(at), y1: TOP, y2: HEIGHT - BOTTOM });
      const head = add(marks, "path", { class: mark.kind, d: `M${x(at) - 5} ${TOP - 8}h10l-5 8z` });
      for (const element of [line, head]) add(element, "title", {}, mark.text);
    }
    const paths = svg.querySelector(".curves");
    paths.replaceChildren();
    panel.curves.forEach((curve, place) => {
      if (hidden[index].has(place)) return;
      const xs = curve[over.value];
      let d = "", pen = "M";
      curve.y.forEach((value, at) => {
        const next = xs[at + 1] ?? xs[at], before = xs[at - 1] ?? xs[at];
        if (value === null) pen = "M";
        else if (next >= start && before <= end) {
          d += `${pen}${x(xs[at]).toFixed(1)} ${y(value).toFixed(1)}`;
          pen = "L";
        }
      });
      add(paths, "path", { class: `c${curve.colour % 8}`, d: d && d + "h.01", "clip-path": `url(#clip)` });
    });
  };
  const drawAll = () => svgs.forEach((_, index) => draw(index));

  // What lies outside the part that is asked for is cut off
  const clip = add(svgs.length ? svgs[0] : document.createElementNS(NS, "svg"), "clipPath", { id: "clip" });
  add(clip, "rect", { x: LEFT, y: 0, width: WIDTH - LEFT - RIGHT, height: HEIGHT - BOTTOM });

  // Reading off

  const read = (index, at) => {
    const svg = svgs[index], cursor = svg.querySelector(".cursor"), { x, start, end } = scales[index];
    const value = Math.min(end, Math.max(start, at));
    const words = [];
    data.panels[index].curves.forEach((curve, place) => {
      if (hidden[index].has(place) || !curve.y.length) return;
      const xs = curve[over.value];
      let low = 0, high = xs.length - 1;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (xs[middle] < value) low = middle; else high = middle;
      }
      const nearest = value - xs[low] <= xs[high] - value ? low : high;
      const said = curve.y[nearest] === null ? "not finite" : curve.y[nearest];
      words.push(`${curve.label} ${value > xs[high] && data.compared ? "has no value here" : said}`);
    });
    cursor.replaceChildren();
    add(cursor, "line", { x1: x(value), x2: x(value), y1: TOP, y2: HEIGHT - BOTTOM });
    const place = over.value === "images" ? `${Math.round(value).toLocaleString("en")} images` : `${value.toFixed(3)} hours`;
    svg.closest(".panel").querySelector("output").textContent = `${place}: ${words.join(", ")}`;
    svg.dataset.at = value;
  };
  const valueAt = (svg, index, event) => {
    const box = svg.getBoundingClientRect(), { start, end } = scales[index];
    const place = ((event.clientX - box.left) / box.width) * WIDTH;
    return start + ((place - LEFT) / (WIDTH - LEFT - RIGHT)) * (end - start);
  };
  const zoom = (a, b) => {
    from.value = Math.max(0, Math.floor((1000 * Math.min(a, b)) / whole()));
    to.value = Math.min(1000, Math.ceil((1000 * Math.max(a, b)) / whole()));
    drawAll();
  };
  svgs.forEach((svg, index) => {
    svg.setAttribute("tabindex", "0");
    let begun = null;
    svg.addEventListener("pointerdown", (event) => { if (event.button === 0) begun = valueAt(svg, index, event); });
    svg.addEventListener("pointermove", (event) => {
      const at = valueAt(svg, index, event);
      read(index, at);
      if (begun === null || !event.buttons) return;
      const { x } = scales[index], [left, right] = [x(begun), x(at)].sort((a, b) => a - b);
      add(svg.querySelector(".cursor"), "rect", { x: left, y: TOP, width: right - left, height: HEIGHT - TOP - BOTTOM });
    });
    svg.addEventListener("pointerup", (event) => {
      const { x } = scales[index], at = valueAt(svg, index, event);
      if (begun !== null && Math.abs(x(at) - x(begun)) > 8) zoom(begun, at);
      begun = null;
    });
    svg.addEventListener("pointerleave", () => {
      begun = null;
      svg.querySelector(".cursor").replaceChildren();
    });
    svg.addEventListener("keydown", (event) => {
      const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (direction === undefined) return;
      event.preventDefault();
      const { start, end } = scales[index];
      read(index, Number(svg.dataset.at ?? start) + (direction * (end - start)) / 50);
    });
    svg.closest(".panel").querySelectorAll(".legend button").forEach((button) => {
      button.addEventListener("click", () => {
        const name = button.textContent, hide = button.getAttribute("aria-pressed") === "true";
        // A run has one colour and name in all panels; the curves of a single run belong to one
        const others = data.compared ? document.querySelectorAll(".legend button") : [button];
        for (const other of others) {
          if (other.textContent !== name) continue;
          other.setAttribute("aria-pressed", String(!hide));
          const panel = svgs.indexOf(other.closest(".panel").querySelector("svg"));
          hidden[panel][hide ? "add" : "delete"](Number(other.dataset.curve));
        }
        drawAll();
      });
    });
  });
  over.addEventListener("change", drawAll);
  [from, to].forEach((input) => input.addEventListener("input", drawAll));
  byId("whole").addEventListener("click", () => zoom(0, whole()));
  drawAll();

  // Grids

  document.querySelectorAll(".film").forEach((film) => {
    const slider = film.querySelector("input"), figures = [...film.querySelectorAll("figure")];
    const show = () => {
      figures.forEach((figure, index) => figure.classList.toggle("current", index === Number(slider.value)));
      slider.setAttribute("aria-valuetext", figures[slider.value].querySelector("figcaption").textContent);
    };
    film.classList.add("moving");
    slider.addEventListener("input", show);
    show();
  });

  const reload = byId("reload");
  if (reload) setInterval(() => { if (reload.checked) location.reload(); }, 30000);
})();
