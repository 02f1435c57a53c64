"use strict";
// A run, or several beside each other: the report, kept fresh as they go on, and their logs.
(() => {
  const { element: h } = Nemotron;
  const MOST_POINTS = 2000; // of a curve that grew while it was watched; then it is told anew, with fewer
  const WHOLE_EVERY = 30; // seconds after which samples, attempts and shares of the time are told again too
  const names = new URLSearchParams(location.search).getAll("run");
  let { report, live } = UI.first();
  let told = Date.now(), logsView = null;

  const several = () => report.runs.length > 1;
  const pairs = (key, values) => values.map((value) => [key, value]);

  // What came.

  function join(run, now) {
    Object.assign(run, { state: now.state, reason: now.reason, exit_code: now.exit_code, attempt: now.attempt,
      job_id: now.job_id, submitted: now.submitted, started: now.started, ended: now.ended,
      missing: several() || UI.LIVE.has(now.state) ? "" : now.missing });
    live[run.name] = now;
  }

  /** Put the news of curves behind what is known; false where that is not so simple. */
  function extend(known, news) {
    const from = new Map(), counts = new Map();
    for (const [name, curve] of Object.entries(news.of)) {
      const mine = known.of[name];
      if (!mine || (from.has(mine.axis) && from.get(mine.axis) !== curve.axis)) return false;
      if (curve.lo && !mine.lo) return false;
      from.set(mine.axis, curve.axis);
      counts.set(mine.axis, (counts.get(mine.axis) || 0) + 1);
    }
    for (const [axis, count] of counts) {
      if (Object.values(known.of).filter((curve) => curve.axis === axis).length !== count) return false;
    }
    const cuts = new Map();
    for (const [axis, theirs] of from) {
      const x = known.axes[axis], more = news.axes[theirs];
      let cut = x.length;
      while (cut && x[cut - 1] >= more[0]) cut -= 1;
      cuts.set(axis, cut);
      if (cut + more.length > MOST_POINTS) return false;
      known.axes[axis] = [...x.slice(0, cut), ...more];
    }
    for (const [name, curve] of Object.entries(news.of)) {
      const mine = known.of[name], cut = cuts.get(mine.axis);
      for (const edge of ["lo", "hi"]) if (mine[edge]) mine[edge] = [...mine[edge].slice(0, cut), ...(curve[edge] || curve.y)];
      mine.y = [...mine.y.slice(0, cut), ...curve.y];
    }
    return true;
  }

  /** Take the news of one run; whether the page must be told all again. */
  function take(run, news) {
    if (news && news.busy) return false;
    if (!news || !extend(run.metrics, news.metrics)) return true;
    for (const [name, curve] of Object.entries(news.metrics.of)) {
      const last = curve.y.findLast((value) => value !== null);
      if (last !== undefined) run.last[name] = last;
    }
    const time = run.metrics.of.time;
    if (time && time.y.length) run.updated = time.y[time.y.length - 1];
    Object.assign(run, { last_step: news.last_step, warnings: news.warnings, problems: news.problems, bad_lines: news.bad_lines });
    join(run, news.live);
    return false;
  }

  const unread = () => Object.keys(live).length > report.runs.length;

  async function whole() {
    ({ report, live } = await UI.ask("/api/report", pairs("run", names)));
    told = Date.now();
    show();
  }

  async function look() {
    const mine = report.runs;
    if (unread()) return whole();
    const answer = await UI.ask("/api/news", [...pairs("run", mine.map((run) => run.name)),
      ...pairs("mark", mine.map((run) => live[run.name].mark)), ...pairs("step", mine.map((run) => run.last_step ?? 0))]);
    const before = JSON.stringify(mine.map((run) => [live[run.name], run.last_step, run.updated]));
    const again = mine.map((run) => take(run, answer.runs[run.name])).some(Boolean);
    const moving = mine.some((run) => UI.LIVE.has(run.state));
    if (again || (moving && Date.now() - told > WHOLE_EVERY * 1000)) {
      await whole();
    } else if (before !== JSON.stringify(mine.map((run) => [live[run.name], run.last_step, run.updated]))) {
      show();
    }
  }

  // How it looks.

  const main = document.getElementById("main");
  const box = h("div", { id: "report" });
  const logs = h("div", { hidden: true });

  function show() {
    UI.banner("away", [...new Set(Object.values(live).map((now) => now.problem).filter(Boolean))].join("\n"));
    for (const run of report.runs) join(run, live[run.name]);
    const without = report.runs.filter((run) => live[run.name].missing && (several() || UI.LIVE.has(run.state)));
    const more = without.length > 1 ? ` (and ${without.length - 1} more of ${report.runs.length} runs)` : "";
    UI.banner("missing", without.length ? `${live[without[0].name].missing}${more}` : "");
    if (!report.runs.length) {
      box.replaceChildren(h("p", { class: "note", role: "status" }, "Reading the run's files \u2026"));
      return;
    }
    Nemotron.show(report, box);
  }

  function view() {
    const wanted = location.hash === "#logs";
    box.hidden = wanted;
    logs.hidden = !wanted;
    views.forEach((link) => link.toggleAttribute("aria-current", (link.hash === "#logs") === wanted));
    if (wanted && !logsView) logsView = UI.logs(logs, Object.keys(live), () => live);
    if (logsView) logsView.shown(wanted);
    if (!wanted) show();
  }

  const views = [h("a", { href: "#plots" }, "Report"), h("a", { href: "#logs" }, "Logs")];
  const saved = `/report?${new URLSearchParams([...pairs("run", names), ["save", ""]])}`;
  UI.head(show, h("a", { class: "crumb", href: "/" }, "Runs"), h("nav", { class: "views", "aria-label": "Views" }, ...views),
    h("a", { class: "button save", href: saved, title: "The report as one file" }, "Save"));
  main.append(box, logs);
  addEventListener("hashchange", () => { if (["", "#plots", "#logs"].includes(location.hash)) view(); });
  view();
  const turn = UI.keepLooking(look, () => (unread() ? 0.5 : Object.values(live).some((now) => UI.LIVE.has(now.state)) ? 1 : 10));
  if (unread()) turn();
})();
