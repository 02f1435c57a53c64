"use strict";
// What the pages of `nemotron ui` share: times, states, their head, and asking the server again and again.
const UI = (() => {
  const { element } = Nemotron;
  const LIVE = new Set(["submitting", "pending", "running"]);

  // 90 → 1m 30s: two units at most.
  function span(seconds) {
    let left = Math.max(0, Math.floor(seconds));
    const parts = [];
    for (const [unit, size] of [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]]) {
      const count = Math.floor(left / size);
      left -= count * size;
      if (count || (unit === "s" && !parts.length)) parts.push(`${count}${unit}`);
      else if (parts.length) break;
    }
    return parts.slice(0, 2).join(" ");
  }

  const ago = (moment, now) => (now - moment < 5 ? "just now" : `${span(now - moment).split(" ")[0]} ago`);
  const state = (name, more) => element("span", { class: `state ${name}` }, more ? `${name}, ${more}` : name);
  const took = (run, now) => (run.started ? (run.ended || (LIVE.has(run.state) ? now : run.started)) - run.started : null);
  const first = () => JSON.parse(document.getElementById("first").textContent);
  const query = (pairs) => new URLSearchParams(pairs).toString();
  const runAddress = (names) => `/run?${query(names.map((name) => ["run", name]))}`;

  // pairs: [name, value], a name as often as wanted. What the server says of a failure is the error's message.
  async function ask(path, pairs) {
    const answer = await fetch(`${path}?${query(pairs)}`, { headers: { Accept: "application/json" } });
    const data = await answer.json();
    if (!answer.ok) throw Object.assign(new Error(data.error || answer.statusText), { said: true });
    return data;
  }

  // Calls `look` again and again, `pause()` seconds after each end, while the page can be seen.
  function keepLooking(look, pause) {
    let timer = null, busy = false, once = false;
    async function turn() {
      clearTimeout(timer);
      if (document.hidden) return;
      if (busy) {
        once = true; // asked for while it looks: once more after that
        return;
      }
      busy = true;
      try {
        await look();
        banner("server", "");
      } catch (error) {
        if (!error.said && !(error instanceof TypeError)) console.error(error);
        banner("server", error.said ? error.message : "The server has ended. Start nemotron ui again, and open the address that it prints.");
      }
      busy = false;
      timer = setTimeout(turn, once ? 0 : pause() * 1000);
      once = false;
    }
    document.addEventListener("visibilitychange", () => { if (!document.hidden) turn(); });
    timer = setTimeout(turn, pause() * 1000);
    return turn;
  }

  // What keeps the page from being fresh, above everything else; an empty text takes it away.
  function banner(kind, text) {
    const all = document.getElementById("banners");
    let one = all.querySelector(`[data-kind="${kind}"]`);
    if (!text) {
      if (one) one.remove();
    } else if (!one || one.textContent !== text) {
      if (!one) all.append(one = element("p", { class: "banner", "data-kind": kind, role: "status" }));
      one.textContent = text;
    }
  }

  // The head of every page. redraw: what is to be painted anew when it turns dark or light.
  function head(redraw, ...more) {
    const turn = () => {
      const name = Nemotron.dark() ? "light" : "dark";
      document.documentElement.dataset.theme = name;
      Nemotron.remembered.set("theme", name);
      redraw();
    };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
      if (Nemotron.remembered.get("theme")) return;
      document.documentElement.dataset.theme = event.matches ? "dark" : "light";
      redraw();
    });
    const bar = element("header", { class: "top" },
      element("a", { class: "home", href: "/" }, element("img", { src: "/assets/icon.svg", alt: "", width: 22, height: 22 }), "nemotron"),
      ...more, element("span", { class: "grow" }),
      element("button", { class: "icon", type: "button", title: "Light or dark", "aria-label": "Light or dark", onclick: turn }, "\u25d0"));
    document.getElementById("app").prepend(bar);
    document.getElementById("main").append(element("div", { id: "banners" }));
  }

  return { LIVE, span, ago, state, took, first, runAddress, ask, keepLooking, banner, head };
})();
