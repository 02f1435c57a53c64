"use strict";
// The page: what the data say, from the warnings down to the config. `Nemotron.show(data)` draws it, and again when there is news.
(function () {
  const { element, number, span, when, plural } = Nemotron;
  const chosen = { smoothing: 0, log: false, x: "step", hidden: new Set(), zoom: null };
  let page = null;

  Nemotron.theme = function (name) {
    const wanted = name || Nemotron.remembered.get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    document.documentElement.dataset.theme = wanted;
  };

  // Draws the report into an element, or brings what is drawn up to date: choices, zoom and what is open stay.
  Nemotron.show = function (data, root = document.getElementById("report")) {
    prepare(data);
    const shape = JSON.stringify([data.runs.map((run) => run.name), data.figures.map((one) => [one.key, one.lines.length, constant(data, one) === null])]);
    if (page && page.root === root && page.shape === shape) {
      page.data = data;
      fill(page);
      page.charts.update(data);
      if (page.compare) page.compare.update(data);
      return;
    }
    build(data, root, shape);
  };

  function prepare(data) {
    const names = data.runs.map((run) => run.name);
    data.runs.forEach((run, index) => {
      run.index = index;
      run.label = labelOf(run, names);
    });
  }

  // As short as it can be told apart: the number of a point, else the name without what all have in common.
  function labelOf(run, names) {
    if (names.length === 1) return run.name;
    if (run.point !== null && run.point !== undefined) {
      const others = new Set(names.map((name) => name.slice(0, name.lastIndexOf("."))));
      return others.size === 1 ? `point ${run.point}` : run.name;
    }
    return run.name.replace(/^\d{8}-\d{6}-/, "");
  }

  function build(data, root, shape) {
    chosen.hidden = new Set([...chosen.hidden].filter((name) => data.runs.some((run) => run.name === name)));
    const charts = new Nemotron.Charts(data, chosen);
    page = { root, shape, data, charts, compare: null, parts: {} };
    for (const name of ["warnings", "head", "time", "samples", "attempts", "lineage", "config"]) page.parts[name] = element("div");
    const several = data.runs.length > 1;
    if (several) {
      page.compare = new Nemotron.Compare(data, chosen, () => { charts.redrawAll(); fill(page); });
    }
    const sections = sectionsOf(data, charts);
    const foot = element("footer", {}, `Written by nemotron ${data.version || ""} from the runs' own files. `,
      "Drag over a plot to zoom, double-click to see all. Plots by uPlot (MIT).");
    root.replaceChildren(element("div", { class: "frame" },
      element("div", { class: "brand" }, element("i"), element("b", {}, "nemotron"),
        several ? plural(data.runs.length, "run") : "run report", element("span", { class: "grow" }), themeButton()),
      page.parts.head, page.parts.warnings,
      several ? section("runs", data.runs.every((run) => run.sweep) ? "Points" : "Runs", page.compare.box) : null,
      controls(sections), ...sections.map((one) => one.box), foot));
    fill(page);
  }

  function section(key, title, ...content) {
    return element("section", { id: `section-${key}`, "data-title": title }, element("header", {}, element("h2", {}, title)), ...content);
  }

  function sectionsOf(data, charts) {
    const found = [], titles = [...new Set(data.figures.map((figure) => figure.section))];
    for (const title of titles) {
      const mine = data.figures.filter((figure) => figure.section === title);
      const plots = element("div", { class: "plots" });
      const add = () => plots.append(...mine.map((figure) => charts.card(figure)));
      const key = title.toLowerCase().replace(/[^a-z]+/g, "-");
      if (mine.every((figure) => figure.key.startsWith("metric:"))) {
        // Many, and few look at them: drawn when asked for.
        const open = element("button", { class: "icon", type: "button", onclick: () => { open.remove(); add(); } }, `Show ${plural(mine.length, "plot")}`);
        found.push({ key, title, box: section(key, title, open, plots) });
      } else {
        const still = mine.filter((figure) => constant(data, figure) !== null);
        plots.append(...mine.filter((figure) => !still.includes(figure)).map((figure) => charts.card(figure)));
        const chips = element("div", { class: "still" }, ...still.map((figure) => {
          const chip = element("button", { type: "button", title: `${figure.help} Press to draw it.`,
            onclick: () => { plots.append(charts.card(figure)); chip.remove(); } }, figure.title, element("b", {}, constant(data, figure)));
          chip.id = `plot-${figure.key}`;
          return chip;
        }));
        found.push({ key, title, box: section(key, title, ...(title.startsWith("Speed") ? [page.parts.time] : []), plots, still.length ? chips : null) });
      }
    }
    if (data.runs.some((run) => run.samples.length)) found.push({ key: "samples", title: "Samples", box: section("samples", "Samples", page.parts.samples) });
    if (data.runs.some((run) => run.attempts.length)) found.push({ key: "attempts", title: "Attempts", box: section("attempts", "Attempts", page.parts.attempts) });
    if (data.lineage) found.push({ key: "lineage", title: "Lineage", box: section("lineage", "Lineage", page.parts.lineage) });
    found.push({ key: "config", title: "Config", box: section("config", "Config", page.parts.config) });
    return found;
  }

  // What a plot would show that never moves: its values; null where it does.
  function constant(data, figure) {
    const found = [];
    for (const run of data.runs) {
      for (const line of figure.lines) {
        const curve = run.metrics.of[line.metric];
        if (!curve) continue;
        const there = [...curve.y, ...(curve.lo || []), ...(curve.hi || [])].filter((value) => value !== null);
        if (curve.y.length < 4 || there.some((value) => Math.abs(value - there[0]) > 1e-6 * Math.abs(there[0]))) return null;
        found.push(number(there[0]));
      }
    }
    return [...new Set(found)].slice(0, 3).join(", ");
  }

  // -- Controls -------------------------------------------------------------------------------------------------

  function themeButton() {
    const button = element("button", { class: "icon", type: "button", title: "Light or dark", "aria-label": "Light or dark",
      onclick: () => {
        const name = Nemotron.dark() ? "light" : "dark";
        Nemotron.theme(name);
        Nemotron.remembered.set("theme", name);
        page.charts.redrawAll();
        if (page.compare) page.compare.draw();
        fill(page);
      } }, "\u25d0");
    return button;
  }

  function controls(sections) {
    const charts = page.charts;
    const shown = element("output", {}, "off");
    const slider = element("input", { type: "range", min: 0, max: 99, value: Math.round(chosen.smoothing * 100), "aria-label": "Smoothing",
      oninput: (event) => {
        chosen.smoothing = event.currentTarget.value / 100;
        shown.textContent = chosen.smoothing ? chosen.smoothing.toFixed(2) : "off";
        charts.redrawAll();
      } });
    const axis = (key, label) => element("button", { type: "button", "aria-pressed": String(chosen.x === key), onclick: (event) => {
      chosen.x = key;
      chosen.zoom = null;
      reset.hidden = true;
      for (const one of event.currentTarget.parentNode.children) one.setAttribute("aria-pressed", String(one === event.currentTarget));
      charts.redrawAll();
    } }, label);
    const log = element("button", { class: "icon", type: "button", title: "Logarithmic scales", "aria-pressed": String(chosen.log), onclick: (event) => {
      chosen.log = !chosen.log;
      event.currentTarget.setAttribute("aria-pressed", String(chosen.log));
      charts.redrawAll();
    } }, "log");
    const reset = element("button", { class: "icon", type: "button", hidden: true, onclick: () => { chosen.zoom = null; charts.zoomAll(); } }, "see all");
    charts.onzoom = (zoom) => { reset.hidden = !zoom; };
    return element("div", { class: "controls" },
      element("nav", { class: "tabs", "aria-label": "Sections" }, ...sections.map((one) => element("a", { href: `#section-${one.key}` }, one.title))),
      element("div", { class: "tools" }, reset, element("label", {}, "smooth", slider, shown), log,
        element("div", { class: "choice", role: "group", "aria-label": "Horizontal axis" }, axis("step", "step"), axis("time", "time"))));
  }

  // -- What changes while a run goes ----------------------------------------------------------------------------

  function fill({ data, parts }) {
    parts.head.replaceChildren(head(data));
    parts.warnings.replaceChildren(warnings(data));
    parts.time.replaceChildren(...shares(data));
    parts.attempts.replaceChildren(attempts(data));
    parts.lineage.replaceChildren(...lineage(data));
    keepOpen(parts.samples, () => samples(data));
    keepOpen(parts.config, () => config(data));
  }

  // Built once; again only where its data have changed, so that what a reader opened or typed stays.
  function keepOpen(part, make) {
    const key = JSON.stringify([page.data.runs.map((run) => [run.name, run.samples.length, run.samples.at(-1), Object.keys(run.config).length])]);
    if (part.dataset.key === key) return;
    part.dataset.key = key;
    part.replaceChildren(make());
  }

  function head(data) {
    if (data.runs.length > 1) {
      const steps = new Set(data.runs.map((run) => run.step).filter(Boolean));
      const sweeps = new Set(data.runs.map((run) => run.sweep || ""));
      const sweep = sweeps.size === 1 ? [...sweeps][0] : "";
      return element("header", { class: "card head" },
        element("div", { class: "line" }, element("h1", {}, sweep || plural(data.runs.length, "run")), ...states(data.runs)),
        element("p", { class: "what" }, [...steps].join(", ")));
    }
    const run = data.runs[0];
    const command = [run.step, run.config_name ? `-c ${run.config_name}` : "", ...run.overrides].filter(Boolean).join(" ");
    const began = run.started || (run.metrics.of.time ? run.metrics.of.time.y[0] : null), ended = run.ended || run.updated;
    const facts = [
      ["started", when(run.started)], ["ended", when(run.ended)], ["updated", run.ended ? "" : when(run.updated)],
      ["why", run.reason], ["profile", run.profile], ["where", place(run)], ["output", run.output_dir],
    ].filter(([, value]) => value);
    const done = run.total_steps && run.last_step !== null ? Math.min(1, run.last_step / run.total_steps) : null;
    const progress = run.last_step === null ? "" : `step ${number(run.last_step)}${run.total_steps ? ` of ${number(run.total_steps)}` : ""}`;
    return element("header", { class: "card head" },
      element("div", { class: "line" }, element("h1", {}, run.name), ...states([run]),
        element("span", { class: "muted" }, [progress, began && ended ? span(ended - began) : ""].filter(Boolean).join(" \u00b7 "))),
      command ? element("p", { class: "what mono" }, command) : null,
      done === null ? null : element("div", { class: "bar", role: "progressbar", "aria-valuenow": Math.round(done * 100), "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": "Steps" },
        element("i", { style: { width: `${done * 100}%` } })),
      element("div", { class: "tiles" }, ...data.results.filter((one) => run.last[one.metric] !== undefined && run.last[one.metric] !== null).map((one) =>
        element("div", { class: "tile", title: one.metric }, element("span", {}, one.label), element("b", {}, number(run.last[one.metric]))))),
      element("dl", { class: "facts" }, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))));
  }

  function states(runs) {
    const counts = new Map();
    for (const run of runs) if (run.state) counts.set(run.state, (counts.get(run.state) || 0) + 1);
    const code = runs.length === 1 && runs[0].exit_code ? `, exit code ${runs[0].exit_code}` : "";
    return [...counts].map(([state, count]) => element("span", { class: `state ${state}` }, runs.length > 1 ? `${count} ${state}` : state + code));
  }

  function place(run) {
    if (!run.executor) return "";
    const nodes = run.nodes > 1 ? `, ${plural(run.nodes, "node")}` : "";
    return `${run.executor === "local" ? "this machine" : run.executor}${run.host ? ` (${run.host})` : ""}${nodes}${run.job_id ? `, job ${run.job_id}` : ""}`;
  }

  function warnings(data) {
    const several = data.runs.length > 1, boxes = [];
    for (const run of data.runs) {
      const of = several ? `${run.label}: ` : "";
      for (const one of run.warnings) {
        const figure = data.figures.find((each) => each.lines.some((line) => one.metrics.includes(line.metric)));
        boxes.push(element("div", { class: "warning", role: "note" }, element("i", {}, "\u26a0"),
          element("p", {}, element("b", {}, of + one.when)),
          element("p", { class: "seen" }, one.seen + " ", figure ? element("a", { class: "jump", href: `#plot-${figure.key}` }, "show the plot") : null),
          element("p", { class: "then" }, ...named(one.then, one.parameters))));
      }
      if (run.problems.length) {
        const more = run.bad_lines > 1 ? `${plural(run.bad_lines, "line")} of its metrics cannot be read` : "a line of its metrics cannot be read";
        boxes.push(element("div", { class: "warning bad", role: "note" }, element("i", {}, "!"),
          element("p", {}, element("b", {}, `${of}${more}; the rest is shown`)), element("p", { class: "seen mono" }, run.problems.slice(0, 5).join("\n"))));
      }
      if (run.missing) boxes.push(element("div", { class: "warning bad", role: "note" }, element("i", {}, "!"), element("p", {}, element("b", {}, run.missing))));
    }
    return boxes.length ? element("div", { class: "warnings" }, ...boxes.slice(0, 40)) : "";
  }

  // The advice, with the parameters that it names set apart.
  function named(text, parameters) {
    const parts = [], known = [...parameters].sort((a, b) => b.length - a.length);
    let rest = text;
    while (rest) {
      const found = known.map((name) => [rest.indexOf(name), name]).filter(([at]) => at >= 0).sort((a, b) => a[0] - b[0] || b[1].length - a[1].length)[0];
      if (!found) { parts.push(rest); break; }
      const behind = rest.slice(found[0] + found[1].length), value = /^=[\w.+-]*\w/.exec(behind);
      parts.push(rest.slice(0, found[0]), element("code", {}, found[1] + (value ? value[0] : "")));
      rest = behind.slice(value ? value[0].length : 0);
    }
    return parts;
  }

  function shares(data) {
    const runs = data.runs.filter((run) => !chosen.hidden.has(run.name) && run.time_shares.length).slice(0, 8);
    if (!runs.length) return [];
    const kinds = [...new Set(runs.flatMap((run) => run.time_shares.map((one) => one.part)))];
    const bars = runs.map((run) => {
      const total = run.time_shares.reduce((sum, one) => sum + one.seconds, 0);
      return element("div", { class: "run" }, runs.length > 1 ? element("span", { class: "muted" }, run.label) : null,
        element("div", { class: "stack" }, ...run.time_shares.map((one) => element("i", { title: `${one.part}: ${span(one.seconds)}`,
          style: { width: `${(100 * one.seconds) / total}%`, background: Nemotron.colour(kinds.indexOf(one.part)) } }))));
    });
    const first = runs[0].time_shares, total = first.reduce((sum, one) => sum + one.seconds, 0);
    const legend = kinds.map((part) => {
      const one = runs.length === 1 ? first.find((each) => each.part === part) : null;
      return element("span", {}, element("i", { class: "swatch", style: { color: Nemotron.colour(kinds.indexOf(part)) } }), part,
        one ? element("b", {}, `${Math.round((100 * one.seconds) / total)}%`) : null, one ? span(one.seconds) : null);
    });
    return [element("div", { class: "card shares" }, element("h3", {}, "Where the time went"), ...bars, element("div", { class: "legend" }, ...legend))];
  }

  function attempts(data) {
    const several = data.runs.length > 1;
    const rows = data.runs.flatMap((run) => run.attempts.map((one) => element("tr", {}, several ? element("td", {}, run.label) : null,
      element("td", {}, `attempt ${one.number}`), element("td", {}, one.exit_code === null ? "no exit code" : `exit code ${one.exit_code}`),
      element("td", {}, when(one.changed)), element("td", {}, Object.entries(one.nodes).map(([name, code]) => `${name}: ${code}`).join(", ")))));
    return element("div", { class: "card scroll" }, element("table", {}, element("tbody", {}, ...rows)));
  }

  function lineage(data) {
    return data.lineage ? [element("div", { class: "card" }, Nemotron.lineage(data.lineage))] : [];
  }

  function samples(data) {
    const all = data.runs.flatMap((run) => run.samples.map((sample) => ({ ...sample, run })));
    const list = element("div", { class: "samples" });
    const kinds = [...new Set(all.map((one) => one.kind).filter(Boolean))];
    const state = { kind: "all", order: "newest", text: "", shown: 9 };
    const draw = () => {
      const wanted = state.text.toLowerCase();
      const found = all.filter((one) => (state.kind === "all" || one.kind === state.kind)
        && (!wanted || `${one.question}\n${one.answer}`.toLowerCase().includes(wanted)));
      const reward = (one) => one.reward ?? -Infinity;
      if (state.order === "newest") found.sort((a, b) => b.step - a.step || reward(b) - reward(a));
      else found.sort((a, b) => (state.order === "best" ? reward(b) - reward(a) : reward(a) - reward(b)) || b.step - a.step);
      const rewards = all.map((one) => one.reward).filter((value) => value !== null);
      const high = Math.max(...rewards), low = Math.min(...rewards);
      list.replaceChildren(...found.slice(0, state.shown).map((one) => element("article", { class: "card sample" },
        element("header", {}, element("span", { class: `reward ${one.reward === null || high === low ? "" : one.reward === high ? "high" : one.reward === low ? "low" : ""}` }, `reward ${number(one.reward)}`),
          [data.runs.length > 1 ? one.run.label : null, `step ${number(one.step)}`, one.kind, one.tokens === null ? null : plural(one.tokens, "token"),
            one.truncated ? "truncated" : null, one.error].filter(Boolean).join(" \u00b7 ")),
        element("pre", { class: "question" }, one.question.trim()), element("pre", { class: "answer" }, one.answer.trim() || "(empty)"))),
      found.length ? "" : element("p", { class: "muted" }, "No such answers."));
      more.hidden = found.length <= state.shown;
      more.textContent = `Show ${found.length - state.shown} more`;
    };
    const more = element("button", { class: "icon", type: "button", style: { "margin-top": "12px" }, onclick: () => { state.shown = Infinity; draw(); } });
    const choice = (key, values) => element("div", { class: "choice", role: "group" }, ...values.map((value) => element("button", { type: "button", "aria-pressed": String(state[key] === value), onclick: (event) => {
      state[key] = value;
      for (const one of event.currentTarget.parentNode.children) one.setAttribute("aria-pressed", String(one === event.currentTarget));
      draw();
    } }, value)));
    const search = element("input", { class: "field", type: "search", placeholder: "Search the answers", "aria-label": "Search the answers", oninput: (event) => { state.text = event.currentTarget.value; draw(); } });
    draw();
    return element("div", {}, element("header", { class: "tools", style: { "flex-wrap": "wrap", "margin-bottom": "12px" } }, choice("order", ["newest", "best", "worst"]),
      kinds.length > 1 ? choice("kind", ["all", ...kinds]) : null, search), list, more);
  }

  function config(data) {
    const several = data.runs.length > 1, differ = new Set(data.differences);
    const runs = data.runs.slice(0, 8);
    const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
    const state = { text: "", only: several && data.differences.length > 0 };
    const list = element("div", {});
    const shown = (value) => (value === undefined ? "\u2013" : typeof value === "string" ? value : JSON.stringify(value));
    const draw = () => {
      const wanted = state.text.toLowerCase();
      const found = keys.filter((key) => (!state.only || differ.has(key))
        && (!wanted || key.toLowerCase().includes(wanted) || runs.some((run) => shown(run.config[key]).toLowerCase().includes(wanted))));
      const groups = new Map();
      for (const key of found) {
        const name = key.includes(".") ? key.slice(0, key.indexOf(".")) : "";
        groups.set(name, [...(groups.get(name) || []), key]);
      }
      list.replaceChildren(...[...groups].map(([name, mine]) => element("details", { open: Boolean(wanted) || state.only || groups.size === 1 },
        element("summary", {}, name || "top level", element("small", {}, plural(mine.length, "key"))),
        element("div", { class: "scroll" }, element("table", {},
          several ? element("thead", {}, element("tr", {}, element("th", {}, "key"), ...runs.map((run) => element("th", {}, run.label)))) : null,
          element("tbody", {}, ...mine.map((key) => element("tr", { class: several && !state.only && differ.has(key) ? "differs" : null },
            element("td", {}, key), ...runs.map((run) => element("td", {}, shown(run.config[key]))))))))),
      ), found.length ? "" : element("p", { class: "muted", style: { padding: "12px 14px" } }, keys.length ? "Nothing matches." : "There is no config to read."));
    };
    const search = element("input", { class: "field", type: "search", placeholder: "Search keys and values", "aria-label": "Search keys and values", oninput: (event) => { state.text = event.currentTarget.value; draw(); } });
    const only = element("input", { type: "checkbox", onchange: (event) => { state.only = event.currentTarget.checked; draw(); } });
    only.checked = state.only;
    draw();
    return element("div", {}, element("header", { class: "tools", style: { "flex-wrap": "wrap", "margin-bottom": "12px" } }, search,
      several ? element("label", {}, only, "differences only") : null,
      several && data.runs.length > runs.length ? `the first ${runs.length} runs` : null), element("div", { class: "card config" }, list));
  }

  Nemotron.theme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (Nemotron.remembered.get("theme")) return;
    Nemotron.theme();
    if (page) { page.charts.redrawAll(); fill(page); }
  });
  const data = document.getElementById("data");
  if (data && data.textContent) Nemotron.show(JSON.parse(data.textContent));
})();
