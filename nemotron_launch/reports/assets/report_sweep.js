"use strict";
// Several runs beside each other: a table that can be sorted, and parallel coordinates that can be brushed.
(function () {
  const { element, number } = Nemotron;
  const SVG = "http://www.w3.org/2000/svg";

  function svg(tag, attributes, ...children) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // columns: {key, title, config: true where it is a setting, of(run)}. onhide: called when runs are shown or hidden.
  Nemotron.Compare = class {
    constructor(data, chosen, onhide) {
      this.data = data;
      this.chosen = chosen;
      this.onhide = onhide;
      this.sorted = { key: null, down: false };
      this.brushes = new Map();
      this.table = element("div", { class: "scroll" });
      this.drawing = element("div", { class: "parallel" });
      this.box = element("div", { class: "card runs" }, this.drawing, this.table);
      this.draw();
      this.width = 0;
      new ResizeObserver(() => {
        if (Math.abs(this.box.clientWidth - this.width) < 2) return;
        this.width = this.box.clientWidth;
        this.draw();
      }).observe(this.box);
    }

    update(data) {
      this.data = data;
      this.draw();
    }

    columns() {
      const { differences, results } = this.data;
      const tail = (key) => key.split(".").slice(-1)[0];
      const tails = differences.map(tail);
      const settings = differences.map((key) => ({
        key, config: true, title: tails.filter((one) => one === tail(key)).length > 1 ? key.split(".").slice(-2).join(".") : tail(key),
        of: (run) => plain(run.config[key]),
      }));
      return [...settings, ...results.map((one) => ({
        key: one.metric, title: one.label, better: one.better, of: (run) => run.last[one.metric] ?? null,
      }))];
    }

    draw() {
      this.drawTable();
      const columns = this.axes();
      this.drawing.hidden = columns.length < 2 || this.data.runs.length < 3;
      if (!this.drawing.hidden) this.drawParallel(columns);
    }

    drawTable() {
      const columns = this.columns().filter((one) => !one.config || this.data.differences.length <= 12 || one.swept);
      const head = (column) => {
        const up = this.sorted.key === column.key ? (this.sorted.down ? " \u2193" : " \u2191") : "";
        return element("th", { class: numeric.has(column.key) ? "number" : null, title: column.key },
          element("button", { type: "button", onclick: () => this.sort(column.key) }, column.title + up,
            column.title === column.key ? null : element("small", {}, column.key)));
      };
      const runs = [...this.data.runs];
      const numeric = new Set(columns.filter((one) => runs.some((run) => typeof one.of(run) === "number")).map((one) => one.key));
      const by = columns.find((one) => one.key === this.sorted.key);
      if (by) runs.sort((a, b) => compare(by.of(a), by.of(b)) * (this.sorted.down ? -1 : 1));
      const best = new Map(columns.filter((one) => one.better).map((one) => {
        const values = runs.map(one.of).filter((value) => value !== null);
        if (new Set(values).size < 2) return [one.key, null];
        return [one.key, one.better === "high" ? Math.max(...values) : Math.min(...values)];
      }));
      const all = element("input", { type: "checkbox", "aria-label": "Show all runs",
        onchange: (event) => this.showAll(event.currentTarget.checked) });
      all.checked = this.chosen.hidden.size === 0;
      all.indeterminate = this.chosen.hidden.size > 0 && this.chosen.hidden.size < runs.length;
      const rows = runs.map((run) => {
        const shown = !this.chosen.hidden.has(run.name);
        const tick = element("input", { type: "checkbox", "aria-label": `Show ${run.label}`,
          onchange: (event) => this.show(run.name, event.currentTarget.checked) });
        tick.checked = shown;
        return element("tr", { class: shown ? null : "off", "data-run": run.index,
          onmouseenter: () => this.heat(run.index, true), onmouseleave: () => this.heat(run.index, false) },
          element("td", { title: run.name }, element("label", {}, tick,
            element("i", { class: "swatch", style: { color: Nemotron.colour(run.index) } }), run.label)),
          element("td", {}, run.state ? element("span", { class: `state ${run.state}` }, run.state) : "\u2013"),
          element("td", { class: "number" }, number(run.last_step)),
          ...columns.map((column) => {
            const value = column.of(run), isNumber = typeof value === "number" || (value === null && numeric.has(column.key));
            const first = value !== null && best.get(column.key) === value;
            return element("td", { class: `${isNumber ? "number" : ""}${first ? " best" : ""}` }, isNumber ? number(value) : value ?? "\u2013");
          }));
      });
      this.table.replaceChildren(element("table", {},
        element("thead", {}, element("tr", {}, element("th", {}, all), element("th", {}, "state"),
          element("th", { class: "number" }, "step"), ...columns.map(head))),
        element("tbody", {}, ...rows)));
    }

    sort(key) {
      this.sorted = { key, down: this.sorted.key === key ? !this.sorted.down : false };
      this.drawTable();
    }

    show(name, on) {
      if (on) this.chosen.hidden.delete(name); else this.chosen.hidden.add(name);
      this.draw();
      this.onhide();
    }

    showAll(on) {
      this.chosen.hidden.clear();
      this.brushes.clear();
      if (!on) for (const run of this.data.runs) this.chosen.hidden.add(run.name);
      this.draw();
      this.onhide();
    }

    heat(index, on) {
      const path = this.drawing.querySelector(`path[data-run="${index}"]`);
      if (path) path.classList.toggle("hot", on);
      const row = this.table.querySelector(`tr[data-run="${index}"]`);
      if (row) row.classList.toggle("hot", on);
    }

    // Columns whose values differ, at most twelve: settings first, results behind them.
    axes() {
      const runs = this.data.runs;
      const differing = this.columns().filter((one) => new Set(runs.map((run) => one.of(run)).filter((value) => value !== null)).size > 1);
      const settings = differing.filter((one) => one.config).slice(0, 7);
      return [...settings, ...differing.filter((one) => !one.config).slice(0, 12 - settings.length)];
    }

    drawParallel(columns) {
      const width = Math.max(columns.length * 122, this.box.clientWidth - 14, 360), height = 300, top = 40, bottom = 24, side = 74;
      const gap = (width - 2 * side) / (columns.length - 1);
      const scales = columns.map((column) => scaleOf(this.data.runs.map(column.of), top, height - bottom));
      const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Parallel coordinates of the runs" });
      root.style.width = `${width}px`;
      root.style.setProperty("--shown", String(Math.max(0.25, Math.min(0.75, 30 / this.data.runs.length))));
      for (const run of this.data.runs) {
        const points = columns.map((column, i) => [side + i * gap, scales[i].at(column.of(run))]);
        const d = points.map(([x, y], i) => {
          if (y === null) return "";
          const before = i > 0 && points[i - 1][1] !== null ? points[i - 1] : null;
          return before ? `C${before[0] + gap / 2.4},${before[1]} ${x - gap / 2.4},${y} ${x},${y}` : `M${x},${y}`;
        }).join("");
        const path = svg("path", { d, "data-run": run.index, class: this.chosen.hidden.has(run.name) ? "off" : "" },
          svg("title", {}, run.label));
        path.style.color = Nemotron.colour(run.index);
        path.addEventListener("mouseenter", () => this.heat(run.index, true));
        path.addEventListener("mouseleave", () => this.heat(run.index, false));
        root.append(path);
      }
      columns.forEach((column, i) => {
        const x = side + i * gap;
        const title = svg("text", { x, y: 16, "text-anchor": "middle", class: "title" }, short(column.title));
        title.append(svg("title", {}, column.key));
        root.append(title, svg("line", { x1: x, x2: x, y1: top, y2: height - bottom }));
        for (const [text, y] of scales[i].marks) root.append(svg("text", { x: x + 6, y: y + 4 }, text));
        const brush = this.brushes.get(column.key);
        if (brush) root.append(svg("rect", { class: "brush", x: x - 8, width: 16, y: brush[0], height: brush[1] - brush[0], rx: 3 }));
        const hit = svg("rect", { class: "hit", x: x - 18, width: 36, y: top - 6, height: height - top - bottom + 12 });
        this.brushing(hit, root, column, columns, scales, x);
        root.append(hit);
      });
      this.drawing.replaceChildren(root);
    }

    // Drag along an axis: only the runs within stay shown. A click, or nothing dragged, ends it.
    brushing(hit, root, column, columns, scales, x) {
      hit.addEventListener("pointerdown", (event) => {
        event.preventDefault();
        const ratio = 300 / root.getBoundingClientRect().height;
        const at = (one) => (one.clientY - root.getBoundingClientRect().top) * ratio;
        const from = at(event), mark = svg("rect", { class: "brush", x: x - 8, width: 16, y: from, height: 0, rx: 3 });
        root.append(mark);
        hit.setPointerCapture(event.pointerId);
        const move = (one) => {
          mark.setAttribute("y", Math.min(from, at(one)));
          mark.setAttribute("height", Math.abs(at(one) - from));
        };
        hit.addEventListener("pointermove", move);
        hit.addEventListener("pointerup", (one) => {
          hit.removeEventListener("pointermove", move);
          const range = [Math.min(from, at(one)), Math.max(from, at(one))];
          if (range[1] - range[0] < 4) this.brushes.delete(column.key); else this.brushes.set(column.key, range);
          this.chosen.hidden.clear();
          for (const run of this.data.runs) {
            const inside = columns.every((other, i) => {
              const brush = this.brushes.get(other.key), y = scales[i].at(other.of(run));
              return !brush || (y !== null && y >= brush[0] - 3 && y <= brush[1] + 3);
            });
            if (!inside) this.chosen.hidden.add(run.name);
          }
          this.draw();
          this.onhide();
        }, { once: true });
      });
    }
  };

  const short = (text) => (text.length <= 18 ? text : `\u2026${text.slice(-17)}`);

  // Of marks that would lie over each other, the first ones.
  function apart(marks) {
    const kept = [];
    for (const mark of marks) if (kept.every((one) => Math.abs(one[1] - mark[1]) > 13)) kept.push(mark);
    return kept;
  }

  function plain(value) {
    if (value === undefined || value === null) return null;
    return typeof value === "number" ? value : typeof value === "string" ? value : JSON.stringify(value);
  }

  function compare(a, b) {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  }

  // Numbers on a line, logarithmic where they span orders of magnitude; anything else at even distances.
  function scaleOf(values, top, bottom) {
    const there = values.filter((value) => value !== null);
    const middle = (top + bottom) / 2;
    if (there.every((value) => typeof value === "number")) {
      const low = Math.min(...there), high = Math.max(...there);
      const log = low > 0 && high / low >= 30;
      const on = (value) => (log ? Math.log(value) : value);
      const at = (value) => (value === null ? null
        : high === low ? middle : bottom - ((on(value) - on(low)) / (on(high) - on(low))) * (bottom - top));
      const marks = high === low ? [low] : log ? [low, Math.sqrt(low * high), high] : [low, (low + high) / 2, high];
      const few = [...new Set(there)];
      return { at, marks: apart((few.length <= 6 ? [low, high, ...few] : [low, high, ...marks]).map((value) => [number(value), at(value)])) };
    }
    const names = [...new Set(there.map(String))].sort((a, b) => compare(a, b));
    const at = (value) => (value === null ? null
      : names.length < 2 ? middle : bottom - (names.indexOf(String(value)) / (names.length - 1)) * (bottom - top));
    return { at, marks: names.slice(0, 12).map((name) => [name.length > 14 ? `${name.slice(0, 13)}\u2026` : name, at(name)]) };
  }
})();
