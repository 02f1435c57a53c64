"use strict";
// The list of runs: found, filtered, sorted, sweeps folded, kept fresh; chosen ones compared.
(() => {
  const { element: h, plural } = Nemotron;
  const { LIVE } = UI;
  const CHUNK = 80; // rows that are drawn before the page is shown, and at once after that
  const COLUMNS = [
    ["state", "State"], ["run", "Run"], ["step", "Step"], ["progress", "Progress"], ["profile", "Profile"],
    ["created", "Submitted"], ["took", "Took"],
  ];
  const ORDER = ["running", "pending", "submitting", "failed", "lost", "refused", "stopped", "cancelled", "finished"];

  const runs = new Map();
  const drawn = new Map(); // id → [what it was drawn from, row]
  const chosen = new Set();
  const open = new Set(); // sweeps that are unfolded
  const chipOf = new Map(); // state → its chip
  const sizes = new Map(); // of sweeps
  let change = 0, now = Date.now() / 1000, drawing = 0;
  const asked = new URLSearchParams(location.search);
  const wants = {
    text: asked.get("q") || "", state: asked.get("state") || "", step: asked.get("step") || "",
    profile: asked.get("profile") || "", sort: asked.get("sort") || "created", up: asked.has("up"),
  };

  // What came.

  function take(data) {
    for (const name of data.gone) { runs.delete(name); chosen.delete(name); drawn.delete(name); }
    for (const row of data.rows) {
      row.text = [row.run_id, row.step, row.config, row.profile, row.host, row.job_id, row.state, row.reason,
        ...row.overrides].join(" ").toLowerCase();
      runs.set(row.run_id, row);
    }
    if (data.rows.length || data.gone.length) {
      sizes.clear();
      for (const run of runs.values()) if (run.sweep) sizes.set(run.sweep, (sizes.get(run.sweep) || 0) + 1);
    }
    const news = data.rows.length || data.gone.length;
    [change, now] = [data.change, data.now];
    UI.banner("ledger", data.problem);
    UI.banner("away", data.away.join("\n"));
    return news;
  }

  // What is wanted of it.

  function found() {
    const words = wants.text.toLowerCase().split(/\s+/).filter(Boolean);
    return [...runs.values()].filter((run) =>
      (!wants.step || run.step === wants.step) && (!wants.profile || run.profile === wants.profile) &&
      words.every((word) => run.text.includes(word)));
  }

  const KEYS = {
    state: (run) => ORDER.indexOf(run.state), run: (run) => run.run_id, step: (run) => `${run.step} ${run.config}`,
    progress: (run) => (run.progress ? run.progress.step : -1), profile: (run) => run.profile,
    created: (run) => run.created, took: (run) => UI.took(run, now) ?? -1,
  };

  /** Groups in their order: single runs, and sweeps with their points. */
  function groups(list) {
    const key = KEYS[wants.sort] || KEYS.created, sign = wants.up ? 1 : -1;
    const by = (a, b) => { const x = key(a), y = key(b); return (x < y ? -1 : x > y ? 1 : 0) * sign; };
    const known = new Map();
    for (const run of list) {
      const name = run.sweep || run.run_id;
      if (!known.has(name)) known.set(name, {name, sweep: run.sweep, runs: [], all: sizes.get(name)});
      known.get(name).runs.push(run);
    }
    const all = [...known.values()];
    for (const one of all) {
      one.best = one.runs.reduce((a, b) => (by(a, b) <= 0 ? a : b));
      if (one.sweep) one.runs.sort((a, b) => a.point - b.point);
    }
    return all.sort((a, b) => by(a.best, b.best) || (a.name < b.name ? 1 : -1));
  }

  // How it looks.

  const cell = (name, ...content) => h("td", { class: `c-${name}`, role: "cell"}, ...content);

  function overrides(run) {
    return run.overrides.length ? h("span", { class: "overrides", title: run.overrides.join("\n")}, run.overrides.join("  ")) : null;
  }

  function progress(run) {
    const far = run.progress || {};
    const parts = [];
    if (far.step !== undefined) parts.push(`step ${far.step}`);
    for (const [key, label] of [["train/reward", "reward"], ["train/loss", "loss"]]) {
      if (typeof far[key] === "number" && parts.length < 2) parts.push(`${label} ${Nemotron.number(far[key])}`);
    }
    if (parts.length && LIVE.has(run.state)) return parts.join(" · ");
    const why = run.state === "finished" ? "" : run.reason;
    return why ? h("span", { class: "why", title: why}, why) : parts.join(" · ");
  }

  function box(names, label) {
    const all = names.every((name) => chosen.has(name));
    const input = h("input", {type: "checkbox", "aria-label": `choose ${label}`, onchange: () => {
      for (const name of input.names) input.checked ? chosen.add(name) : chosen.delete(name);
      draw();
    }});
    Object.assign(input, { names, checked: all });
    input.indeterminate = !all && names.some((name) => chosen.has(name));
    return cell("box", h("label", { class: "hit"}, input));
  }

  function times(run) {
    const lasted = UI.took(run, now);
    return [
      cell("profile", run.profile || "–"),
      cell("created", h("time", {title: Nemotron.when(run.created)}, UI.ago(run.created, now))),
      cell("took", lasted === null ? "" : UI.span(lasted)),
    ];
  }

  const what = (run) => {
    const parts = run.step.split("/");
    const short = parts.length > 2 ? `${parts[0]}/${parts[parts.length - 1]}` : run.step;
    return cell("step", h("span", {title: run.step}, short), h("span", { class: "muted"}, ` ${run.config}`));
  };

  function runRow(run, point) {
    const exit = run.state === "failed" && run.exit_code !== null ? `exit ${run.exit_code}` : "";
    return h("tr", {role: "row", class: point ? "point" : "", "data-run": run.run_id},
      box([run.run_id], run.run_id),
      cell("state", UI.state(run.state, exit)),
      h("th", {scope: "row", role: "rowheader", class: "c-run"},
        h("a", {href: UI.runAddress([run.run_id])}, point ? `point ${run.point}` : run.run_id), overrides(run)),
      what(run), cell("progress", progress(run)), times(run));
  }

  function sweepRow(group) {
    const counts = ORDER.map((state) => [state, group.runs.filter((run) => run.state === state).length]).filter(([, n]) => n);
    const first = group.runs[0], unfolded = open.has(group.name);
    const bar = h("span", { class: "parts", "aria-hidden": "true"});
    for (const [state, count] of counts) {
      const part = h("span", { class: `part ${state}`});
      part.style.flexGrow = count;
      bar.append(part);
    }
    const whole = {...first, started: Math.min(...group.runs.map((run) => run.started || Infinity)),
      ended: Math.max(...group.runs.map((run) => run.ended || 0)), state: counts[0][0]};
    if (!isFinite(whole.started)) whole.started = null;
    return h("tr", {role: "row", class: "sweep", "data-run": group.name},
      box(group.runs.map((run) => run.run_id), `the points of ${group.name}`),
      cell("state", h("span", { class: "counts"}, counts.map(([state, count]) => `${count} ${state}`).join(", ")), bar),
      h("th", {scope: "row", role: "rowheader", class: "c-run"},
        h("button", { class: "fold", "aria-expanded": String(unfolded), "aria-label": `points of ${group.name}`, onclick: () => {
          unfolded ? open.delete(group.name) : open.add(group.name);
          draw();
        }}, unfolded ? "▾" : "▸"),
        h("a", {href: UI.runAddress([group.name])}, group.name),
        h("span", { class: "overrides"}, group.runs.length === group.all ? `sweep of ${plural(group.all, "point")}` : `${group.runs.length} of ${plural(group.all, "point")} of a sweep`)),
      what(first), cell("progress", ""), times(whole));
  }

  /** Rows, drawn again only where they have changed. */
  function rowsOf(list) {
    const wanted = [];
    for (const group of list) {
      if (!group.sweep || (group.runs.length === 1 && wants.text)) {
        for (const run of group.runs) wanted.push([run.run_id, run, () => runRow(run, false), `${chosen.has(run.run_id)}`]);
        continue;
      }
      const mark = `${open.has(group.name)} ${group.runs.map((run) => chosen.has(run.run_id)).join()}`;
      wanted.push([group.name, group.runs, () => sweepRow(group), mark]);
      if (open.has(group.name)) {
        for (const run of group.runs) wanted.push([run.run_id, run, () => runRow(run, true), `point ${chosen.has(run.run_id)}`]);
      }
    }
    return wanted;
  }

  // A row keeps its elements while it is drawn again: whoever presses or reads one of them is not disturbed.
  function row([name, source, make, mark]) {
    const known = drawn.get(name);
    const same = known && known.mark === mark && (Array.isArray(source) ?
      known.source.length === source.length && source.every((run, n) => run === known.source[n]) : known.source === source);
    if (same && now - known.at < (LIVE.has(source.state) ? 5 : 60)) return known.row;
    const made = make(), old = known && known.row;
    const kept = old && old.children.length === made.children.length;
    if (kept) {
      old.className = made.className;
      [...made.children].forEach((cell, n) => {
        const before = old.children[n], box = cell.querySelector("input"), mine = before.querySelector("input");
        if (box && mine) Object.assign(mine, { names: box.names, checked: box.checked, indeterminate: box.indeterminate });
        else if (before.outerHTML !== cell.outerHTML) before.replaceWith(cell);
      });
    }
    drawn.set(name, { source, mark, row: kept ? old : made, at: now });
    return kept ? old : made;
  }

  function put(parent, children) {
    if (children.length !== parent.children.length || children.some((one, n) => one !== parent.children[n])) parent.replaceChildren(...children);
  }

  // The page.

  const body = h("tbody", {role: "rowgroup"});
  const heads = COLUMNS.map(([key, label]) => h("th", {scope: "col", role: "columnheader", class: `c-${key}`},
    h("button", {"data-sort": key, onclick: () => {
      wants.up = wants.sort === key ? !wants.up : ["run", "step", "profile", "state"].includes(key);
      wants.sort = key;
      changed();
    }}, label)));
  const table = h("table", {role: "table", class: "card list", "aria-label": "Runs"},
    h("thead", {role: "rowgroup"}, h("tr", {role: "row"}, h("th", {role: "columnheader", class: "c-box"}, h("span", { class: "unseen"}, "Choose")), ...heads)), body);
  const search = h("input", {type: "search", id: "search", placeholder: "Search runs, overrides, reasons", "aria-label": "Search runs",
    autocomplete: "off", spellcheck: "false", oninput: () => { wants.text = search.value; changed(); }});
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Filter by state"});
  const steps = h("select", {"aria-label": "Filter by step", onchange: () => { wants.step = steps.value; changed(); }});
  const profiles = h("select", {"aria-label": "Filter by profile", onchange: () => { wants.profile = profiles.value; changed(); }});
  const empty = h("div", { class: "empty", hidden: true});
  const bar = h("div", { class: "chosen card", role: "region", "aria-label": "Chosen runs", hidden: true});
  const count = h("p", { class: "unseen", role: "status"});

  function options(select, all, key, wanted) {
    const values = [...new Set([...runs.values()].map((run) => run[key]).filter(Boolean))].sort();
    const mark = values.join("\n");
    if (select.dataset.mark === mark) return;
    select.dataset.mark = mark;
    select.replaceChildren(h("option", {value: ""}, all), ...values.map((value) => h("option", {value}, value)));
    select.value = values.includes(wanted) ? wanted : "";
  }

  function drawChips(list) {
    const counts = {};
    for (const run of list) counts[run.state] = (counts[run.state] || 0) + 1;
    const states = ORDER.filter((state) => counts[state] || state === wants.state);
    put(chips, ["", ...states].map((state) => chip(state, state ? counts[state] || 0 : list.length)));
  }

  function chip(state, many) {
    if (!chipOf.has(state)) {
      chipOf.set(state, h("button", { class: "chip", type: "button", "data-state": state, onclick: () => {
        wants.state = wants.state === state ? "" : state;
        changed();
      } }, state ? h("i", { class: `dot ${state}` }) : null, state || "all", h("span", { class: "many" })));
    }
    const made = chipOf.get(state);
    made.lastChild.textContent = many;
    made.setAttribute("aria-pressed", String(wants.state === state));
    return made;
  }

  function draw() {
    const list = found();
    drawChips(list);
    options(steps, "All steps", "step", wants.step);
    options(profiles, "All profiles", "profile", wants.profile);
    for (const head of heads) {
      const sorted = head.firstChild.dataset.sort === wants.sort;
      head.setAttribute("aria-sort", sorted ? (wants.up ? "ascending" : "descending") : "none");
    }
    const shown = wants.state ? list.filter((run) => run.state === wants.state) : list;
    const wanted = rowsOf(groups(shown));
    const focused = document.activeElement?.closest?.("tr")?.dataset.run;
    const kind = document.activeElement?.tagName;
    const mine = ++drawing;
    const drawnAll = body.dataset.all === "yes";
    const most = drawnAll ? Math.max(CHUNK, body.children.length) : CHUNK;
    put(body, wanted.slice(0, most).map(row));
    body.dataset.all = wanted.length <= most ? "yes" : "";
    if (wanted.length > most) setTimeout(() => drawMore(wanted, most, mine), 0);
    if (focused) body.querySelector(`tr[data-run="${CSS.escape(focused)}"] ${kind === "INPUT" ? "input" : kind === "BUTTON" ? "button" : "a"}`)?.focus({preventScroll: true});
    table.hidden = !wanted.length;
    empty.hidden = Boolean(wanted.length);
    if (!wanted.length) drawEmpty();
    count.textContent = plural(shown.length, "run");
    drawChoice();
  }

  function drawMore(wanted, at, mine) {
    if (mine !== drawing) return;
    body.append(...wanted.slice(at, at + 4 * CHUNK).map(row));
    if (wanted.length > at + 4 * CHUNK) setTimeout(() => drawMore(wanted, at + 4 * CHUNK, mine), 0);
    else body.dataset.all = "yes";
  }

  function drawEmpty() {
    if (runs.size) {
      empty.replaceChildren(h("h2", {}, "No run matches"), h("button", { class: "button", onclick: clear}, "Show all runs"));
    } else {
      empty.replaceChildren(h("h2", {}, "There are no runs yet"), h("p", {}, "A first one, on this machine, without a GPU:"),
        h("pre", {}, "nemotron steps run rl/nemo_rl/dpo -c tiny -b local"));
    }
  }

  function drawChoice() {
    bar.hidden = !chosen.size;
    if (!chosen.size) return;
    const names = [...chosen];
    bar.replaceChildren(h("span", {}, `${plural(names.length, "run")} chosen`),
      h("a", { class: "button first", href: UI.runAddress(names)}, names.length === 1 ? "Open" : "Compare"),
      h("button", { class: "button", onclick: () => { chosen.clear(); draw(); }}, "Clear"));
  }

  function clear() {
    Object.assign(wants, {text: "", state: "", step: "", profile: ""});
    search.value = steps.value = profiles.value = "";
    changed();
  }

  /** What is wanted is another: kept in the address, so that going back finds it. */
  function changed() {
    const query = new URLSearchParams();
    for (const [name, value] of [["q", wants.text], ["state", wants.state], ["step", wants.step], ["profile", wants.profile]]) {
      if (value) query.set(name, value);
    }
    if (wants.sort !== "created" || wants.up) query.set("sort", wants.sort);
    if (wants.up) query.set("up", "");
    history.replaceState(null, "", query.size ? `/?${query}` : "/");
    draw();
  }

  // Keys: / searches, j and k move, x chooses, Enter opens, c compares.
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input[type=search], select");
    if (event.key === "Escape" && typing) { if (wants.text) { clear(); } else { event.target.blur(); } return; }
    if (typing) { if (event.key === "ArrowDown" && event.target === search) { move(1); event.preventDefault(); } return; }
    if (event.key === "/") { search.focus(); search.select(); event.preventDefault(); }
    else if (event.key === "j" || event.key === "ArrowDown") { move(1); event.preventDefault(); }
    else if (event.key === "k" || event.key === "ArrowUp") { move(-1); event.preventDefault(); }
    else if (event.key === "x") document.activeElement?.closest?.("tr")?.querySelector("input")?.click();
    else if (event.key === "c" && chosen.size) location.assign(UI.runAddress([...chosen]));
  });

  function move(by) {
    const links = [...body.querySelectorAll("tr a")];
    const at = links.indexOf(document.activeElement?.closest?.("tr")?.querySelector("a"));
    (links[at + by] || (at < 0 ? links[0] : search)).focus();
  }

  UI.head(() => {}, h("h1", {}, "Runs"));
  document.getElementById("main").append(
    h("div", { class: "filters"}, h("div", { class: "search"}, search, h("kbd", {"aria-hidden": "true"}, "/")), steps, profiles), chips, count, table, empty, bar);
  search.value = wants.text;
  take(UI.first());
  draw();
  UI.keepLooking(async () => {
    const data = await UI.ask("/api/runs", [["since", change]]);
    if (data.change < change) return location.reload(); // another server has taken this one's place
    const moving = [...runs.values()].some((run) => LIVE.has(run.state));
    if (take(data) || moving || now - lastDrawn > 30) { lastDrawn = now; draw(); }
  }, () => 2);
  let lastDrawn = now;
})();
