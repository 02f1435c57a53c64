"use strict";
// The plots: drawn when they come into view, one cursor for all, zoomed together, smoothed, on a log scale or not.
(function () {
  const { element, number, tick } = Nemotron;
  const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3]];

  // chosen: smoothing (0 to 0.99), log, x ("step" or "time"), hidden (names of runs), zoom ([from, to] or null).
  Nemotron.Charts = class {
    constructor(data, chosen) {
      this.data = data;
      this.chosen = chosen;
      this.cards = [];
      this.sync = uPlot.sync("nemotron");
      this.watcher = new IntersectionObserver((entries) => {
        for (const entry of entries) if (entry.isIntersecting) this.draw(entry.target.card);
      }, { rootMargin: "300px" });
      this.sizes = new ResizeObserver((entries) => {
        for (const entry of entries) {
          const card = entry.target.card;
          if (card.plot) card.plot.setSize({ width: entry.target.clientWidth, height: entry.target.clientHeight });
        }
      });
    }

    card(figure) {
      const drawing = element("div", { class: "drawing", role: "img", "aria-label": figure.title });
      const legend = element("div", { class: "legend" });
      const help = figure.help ? element("p", { class: "help", hidden: true }, figure.help) : null;
      const card = { figure, drawing, legend, log: false, plot: null };
      const button = (label, title, press) =>
        element("button", { class: "icon", type: "button", title, "aria-label": title, "aria-pressed": "false",
          onclick: (event) => {
            const on = event.currentTarget.getAttribute("aria-pressed") !== "true";
            event.currentTarget.setAttribute("aria-pressed", String(on));
            press(on);
          } }, label);
      const box = element("article", { class: "plot card", id: `plot-${figure.key}` },
        element("header", {},
          element("h3", { title: figure.title }, figure.title),
          figure.unit ? element("span", { class: "unit" }, figure.unit) : null,
          element("span", { class: "grow" }),
          help ? button("?", "What it shows", (on) => { help.hidden = !on; }) : null,
          figure.stacked ? null : button("log", "Logarithmic scale", (on) => { card.log = on; this.redraw(card); }),
          button("\u2922", "Larger", (on) => { box.classList.toggle("wide", on); })),
        help, drawing, legend);
      drawing.card = card;
      this.cards.push(card);
      this.watcher.observe(drawing);
      this.sizes.observe(drawing);
      return box;
    }

    update(data) {
      this.data = data;
      for (const card of this.cards) if (card.plot || card.empty) this.refresh(card);
    }

    // New numbers for a plot that stays as it is: its cursor, and what a reader is about to select, stay too.
    refresh(card) {
      const curves = this.curves(card), log = (card.log || this.chosen.log) && !card.figure.stacked;
      if (!card.plot || card.figure.stacked || card.shape !== this.shape(curves, log)) {
        this.redraw(card);
      } else if (card.ends !== endsOf(curves)) {
        card.ends = endsOf(curves);
        const { tables } = this.lines(curves, log);
        card.curves = curves;
        card.plot.setData(tables);
        this.say(card, card.plot.cursor.idx);
      }
    }

    // What a plot was made for: with another shape it is made anew.
    shape(curves, log) {
      const each = (one) => [one.name, one.colour, Boolean(one.lo && one.hi), one.x.length < 40];
      return JSON.stringify([log, this.chosen.smoothing > 0, this.chosen.x, curves.map(each)]);
    }

    redrawAll() {
      for (const card of this.cards) if (card.plot || card.empty) this.redraw(card);
    }

    redraw(card) {
      if (!card.plot && !card.empty) return;
      this.drop(card);
      this.draw(card);
    }

    drop(card) {
      if (card.plot) card.plot.destroy();
      card.plot = null;
      card.empty = false;
      card.drawing.replaceChildren();
    }

    // The curves of a plot: of each run that is shown, each line that it has.
    curves(card) {
      const several = this.data.runs.length > 1, found = [];
      this.data.runs.forEach((run, index) => {
        if (this.chosen.hidden.has(run.name)) return;
        card.figure.lines.forEach((line, kind) => {
          const curve = run.metrics.of[line.metric];
          if (!curve) return;
          const twin = found.find((one) => one.run === run && one.axis === curve.axis && same(one.y, curve.y));
          if (twin) { twin.name += `, ${line.label}`; return; }
          const edges = line.band && line.band.map((name) => run.metrics.of[name]);
          found.push({
            run, line, axis: curve.axis, x: this.across(run, run.metrics.axes[curve.axis]), y: curve.y,
            lo: edges && edges[0] && edges[0].axis === curve.axis ? edges[0].lo || edges[0].y : curve.lo,
            hi: edges && edges[1] && edges[1].axis === curve.axis ? edges[1].hi || edges[1].y : curve.hi,
            colour: Nemotron.colour(several ? index : kind), dash: several ? DASHES[kind % DASHES.length] : [],
            name: several ? `${run.label} \u00b7 ${line.label}` : line.label,
          });
        });
      });
      return found;
    }

    // Steps as they are, or as the seconds since the run's first line.
    across(run, steps) {
      const time = run.metrics.of.time;
      if (this.chosen.x === "step" || !time) return steps;
      const at = run.metrics.axes[time.axis], seconds = time.y, first = seconds[0];
      let j = 0, before = -1;
      return steps.map((step) => {
        while (j < at.length - 1 && at[j] < step) j += 1;
        const back = j > 0 && at[j] > step ? (step - at[j - 1]) / (at[j] - at[j - 1]) : 1;
        const from = j > 0 ? seconds[j - 1] : seconds[j];
        const value = Math.max(before, from + (seconds[j] - from) * back - first);
        before = value + 1e-6; // rising, as the plot wants it
        return value;
      });
    }

    draw(card) {
      if (card.plot || card.empty) return;
      const curves = this.curves(card);
      if (!curves.some((one) => one.y.some((value) => value !== null))) {
        card.empty = true;
        card.drawing.replaceChildren(element("div", { class: "none" }, "no values"));
        card.legend.replaceChildren();
        return;
      }
      card.curves = curves;
      const log = (card.log || this.chosen.log) && !card.figure.stacked;
      [card.shape, card.ends] = [this.shape(curves, log), endsOf(curves)];
      const { tables, series, bands } = card.figure.stacked ? this.stacked(curves) : this.lines(curves, log);
      const width = card.drawing.clientWidth || 400, height = card.drawing.clientHeight || 216;
      const ink = Nemotron.variable("--faint"), rule = Nemotron.variable("--rule");
      const font = `11px ${Nemotron.variable("--sans")}`;
      const axis = { stroke: ink, font, grid: { stroke: rule, width: 1 }, ticks: { show: false } };
      const time = this.chosen.x === "time";
      // Not the edges of bands, nor what was there before smoothing.
      const drawn = (index) => card.curves.some((one) => one.column === index);
      card.plot = new uPlot({
        width, height, padding: [8, 12, 0, 0], legend: { show: false },
        scales: {
          x: { time: false, range: (plot, low, high) => this.reach(plot, low, high) },
          y: log ? { distr: 3 } : { range: (plot, low, high) => between(low, high, card.figure.stacked) },
        },
        axes: [
          { ...axis, size: 28, values: (plot, ticks) => ticks.map((one) => (time ? clock(one) : tick(one))) },
          { ...axis, size: (plot, values) => 16 + 6.6 * Math.max(2, ...(values || []).map((one) => (one || "").length)),
            values: (plot, ticks) => ticks.map(tick) },
        ],
        focus: { alpha: curves.length > 8 ? 0.22 : 1 }, // of a few, the legend tells them apart
        cursor: {
          focus: { prox: 24, dist: (plot, index, at, value, cursor) => (drawn(index) ? value - cursor : Infinity) },
          // The cursor is shared, the selection is not: each plot would take it for its own.
          sync: { key: this.sync.key, filters: { pub: (type) => type !== "mousedown" && type !== "mouseup" } },
          drag: { x: true, y: false, setScale: false }, points: { size: (plot, index) => (drawn(index) ? 6 : 0) },
        },
        series: [{}, ...series], bands,
        hooks: {
          setSeries: [(plot, index, options) => {
            if (!options || !("focus" in options)) return;
            card.focus = card.curves.find((one) => index !== null && index > one.column - one.width && index <= one.column) || null;
            this.say(card, plot.cursor.idx);
          }],
          setCursor: [(plot) => this.say(card, plot.cursor.idx)],
          setSelect: [(plot) => {
            if (plot.select.width < 8) return;
            this.chosen.zoom = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
            this.zoomAll();
          }],
        },
      }, tables, card.drawing);
      card.plot.over.addEventListener("dblclick", () => { this.chosen.zoom = null; this.zoomAll(); });
      this.say(card, null);
    }

    reach(plot, low, high) {
      if (this.chosen.zoom) return this.chosen.zoom;
      return low === high ? [low - 1, high + 1] : [low, high];
    }

    zoomAll() {
      for (const card of this.cards) {
        if (!card.plot) continue;
        card.plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        card.plot.setData(card.plot.data, true);
      }
      this.onzoom(this.chosen.zoom);
    }

    lines(curves, log) {
      const share = this.chosen.smoothing, tables = [], series = [], bands = [];
      for (const one of curves) {
        const clean = (values) => (log ? values.map((value) => (value > 0 ? value : null)) : values);
        const table = [one.x], y = clean(one.y), before = series.length;
        const points = { show: one.x.length < 40, size: 5, fill: one.colour };
        const base = { stroke: one.colour, dash: one.dash, points: { show: false } };
        if (one.lo && one.hi && curves.length <= 12) { // of more, bands would be one grey
          const edge = { ...base, width: 0, stroke: "transparent" };
          bands.push({ series: [series.length + 2, series.length + 1], fill: painted(one.colour, curves.length > 6 ? 0.06 : 0.13) });
          table.push(clean(one.lo), clean(one.hi));
          series.push(edge, { ...edge });
        }
        if (share > 0) {
          table.push(y);
          series.push({ ...base, width: 1, stroke: painted(one.colour, 0.28) });
        }
        table.push(share > 0 ? smoothed(y, share) : y);
        series.push({ ...base, width: 1.8, points });
        one.column = series.length;
        one.width = series.length - before;
        tables.push(table);
      }
      return { tables: uPlot.join(tables), series: series.map((one) => ({ ...one, spanGaps: false })), bands };
    }

    // Parts above each other: of the first run that is shown.
    stacked(curves) {
      const first = curves[0].run, mine = curves.filter((one) => one.run === first);
      const below = mine[0].x.map(() => 0), sums = [];
      mine.forEach((one, kind) => {
        one.colour = Nemotron.colour(kind);
        one.y.forEach((value, i) => { below[i] += value || 0; });
        sums.push([...below]);
      });
      mine.forEach((one, i) => { one.column = mine.length - i; one.width = 1; });
      const series = mine.map((one) => ({ stroke: one.colour, width: 1, fill: painted(one.colour, 0.55), points: { show: false } }));
      const bands = mine.slice(1).map((one, i) => ({ series: [i + 1, i + 2], fill: painted(mine[mine.length - 1 - i].colour, 0.55) }));
      curves.length = 0;
      curves.push(...mine);
      return { tables: [mine[0].x, ...sums.reverse()], series: series.reverse(), bands };
    }

    // Below the plot: every curve's value under the cursor, or its last one.
    say(card, at) {
      const plot = card.plot, curves = card.curves || [];
      if (!plot) return;
      const shown = curves.length <= 8 ? curves : card.focus ? [card.focus] : [];
      const where = at === null || at === undefined ? null : plot.data[0][at];
      const items = shown.map((one) => {
        const value = where === null ? lastOf(one.y) : nearest(one.x, one.y, where);
        return element("span", { title: one.name },
          element("i", { class: "key", style: { color: one.colour, opacity: one.dash.length ? ".65" : "1" } }),
          element("span", { class: "name" }, one.name), element("b", {}, number(value)));
      });
      const place = where === null ? null
        : element("span", {}, this.chosen.x === "time" ? `after ${Nemotron.span(where)}` : `step ${number(Math.round(where))}`);
      if (!shown.length && !place) items.push(element("span", {}, `${curves.length} curves, coloured as in the table; point at one`));
      card.legend.replaceChildren(...(place ? [place] : []), ...items);
    }

    onzoom() {}
  };

  function painted(colour, share) {
    // A canvas takes no color-mix everywhere; #rrggbb and hsl() both take an alpha.
    if (colour.startsWith("#")) return colour + Math.round(share * 255).toString(16).padStart(2, "0");
    return colour.replace(")", ` / ${share})`);
  }

  function between(low, high, fromZero) {
    if (low === null || high === null) return [0, 1];
    if (fromZero) return [0, high * 1.04 || 1];
    if (low === 0 && high === 0) return [0, 1];
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    // An axis that nearly reaches 0 begins there.
    const bottom = low >= 0 && low - room < (high - low) * 0.12 ? Math.min(0, low) - (low === 0 ? room * 0.4 : 0) : low - room;
    return [bottom, high + room];
  }

  function clock(seconds) {
    if (seconds < 120) return `${tick(seconds)}s`;
    return seconds < 7200 ? `${tick(seconds / 60)}m` : `${tick(seconds / 3600)}h`;
  }

  // Exponential moving average without the pull to 0 at its start (as Adam corrects its moments).
  function smoothed(values, share) {
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null || value === undefined) return value;
      sum = share * sum + (1 - share) * value;
      weight = share * weight + (1 - share);
      return sum / weight;
    });
  }
  Nemotron.smoothed = smoothed;

  const same = (a, b) => a.length === b.length && a.every((value, i) => value === b[i]);

  // Curves only grow at their ends.
  const endsOf = (curves) => JSON.stringify(curves.map((one) => [one.x.length, one.x[one.x.length - 1], one.y.slice(-2)]));

  function lastOf(values) {
    for (let i = values.length - 1; i >= 0; i -= 1) if (values[i] !== null) return values[i];
    return null;
  }

  function nearest(x, y, where) {
    let low = 0, high = x.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (x[middle] < where) low = middle + 1; else high = middle;
    }
    if (low > 0 && where - x[low - 1] < x[low] - where) low -= 1;
    return y[low];
  }
})();
