"use strict";
// The logs of runs: their ends, followed while they grow, without anything that a terminal would not print.
(() => {
  const { element: h } = Nemotron;
  const MOST = 5000; // lines that stay in the page
  const BAD = /\b(error|exception|traceback|fatal|failed|killed)\b/i, WARN = /\bwarn(ing)?\b/i;

  UI.logs = (box, names, live) => {
    let name = names[0], source = "", showing = "", partial = false, next = null, follows = true, visible = false, mark = "";
    const runs = h("select", { "aria-label": "Run", hidden: names.length < 2, onchange: () => { name = runs.value; again(""); } },
      ...names.map((one) => h("option", { value: one }, one)));
    const sources = h("select", { "aria-label": "Log", onchange: () => again(sources.value) });
    const search = h("input", { type: "search", placeholder: "Only lines with \u2026", "aria-label": "Only lines with", oninput: filter });
    const wrap = h("input", { type: "checkbox", onchange: () => area.classList.toggle("wrap", wrap.checked) });
    wrap.checked = true;
    const area = h("div", { class: "log card wrap", role: "log", tabindex: "0", "aria-live": "off", "aria-label": "Lines of the log" });
    const newer = h("button", { class: "button newer", type: "button", hidden: true, onclick: () => { follows = true; toEnd(); } }, "Follow \u2193");
    const note = h("div", { class: "note", role: "status" });
    box.replaceChildren(h("div", { class: "logbar" }, runs, sources, search, h("label", {}, wrap, "wrap")), area);
    area.addEventListener("scroll", () => {
      follows = area.scrollHeight - area.scrollTop - area.clientHeight < 40;
      newer.hidden = follows || !UI.LIVE.has(live()[name].state);
    });

    function toEnd() {
      area.scrollTop = area.scrollHeight;
      newer.hidden = true;
    }

    function again(wanted) {
      [source, showing, partial, next, mark, follows] = [wanted, "", false, null, "", true];
      area.replaceChildren(note, newer);
      note.textContent = "Reading \u2026";
      turn();
    }

    function hidden(text) {
      const wanted = search.value.toLowerCase();
      return Boolean(wanted) && !text.toLowerCase().includes(wanted);
    }

    function filter() {
      for (const line of area.querySelectorAll(".line")) line.hidden = hidden(line.textContent);
      if (follows) toEnd();
    }

    function take(data) {
      // Where nobody has chosen one, the job's script is shown only until a node speaks.
      if (source === "" && !data.source.endsWith("/job")) source = data.source;
      if (showing && data.source !== showing) {
        again(source);
        return;
      }
      showing = data.source;
      const known = JSON.stringify(data.sources);
      if (known !== mark) {
        mark = known;
        sources.replaceChildren(...data.sources.map((one) => h("option", { value: `${one.attempt}/${one.name}` },
          one.name === "job" ? "job script" : `${one.name}${data.sources.some((each) => each.attempt) ? `, attempt ${one.attempt}` : ""}`)));
        sources.hidden = data.sources.length < 2;
      }
      if (sources.value !== data.source && data.source) sources.value = data.source;
      if (next !== null && data.first > next) area.querySelectorAll(".line").forEach((line) => line.remove()); // too fast to keep all
      next = data.next;
      for (const text of data.lines) {
        const kind = BAD.test(text) ? " error" : WARN.test(text) ? " warn" : "";
        const line = h("div", { class: `line${kind}` }, text);
        line.hidden = hidden(text);
        area.insertBefore(line, newer);
      }
      const lines = area.getElementsByClassName("line");
      for (let over = lines.length - MOST; over > 0; over -= 1) lines[0].remove();
      partial ||= data.cut || data.next > MOST;
      note.textContent = !data.next ? nothing(data) : partial ? `The end of the log; all of it:  nemotron jobs logs ${name}` : "";
      note.hidden = !note.textContent;
      if (follows && data.lines.length) toEnd();
    }

    function nothing(data) {
      if (data.problem) return data.problem;
      return UI.LIVE.has(data.state) ? `No lines yet: the run is ${data.state}.` : "There is no log of this run: nothing was written, or it was removed.";
    }

    const turn = UI.keepLooking(async () => {
      if (!visible) return;
      const asked = [name, source];
      const data = await UI.ask("/api/logs", [["run", name], ["source", source], ...(next === null ? [] : [["from", next]])]);
      if (!data.busy && asked[0] === name && asked[1] === source) take(data);
    }, () => (visible ? (UI.LIVE.has(live()[name].state) ? 1 : 5) : 3600));

    again("");
    return { shown: (wanted) => { visible = wanted; if (wanted) turn(); } };
  };
})();
