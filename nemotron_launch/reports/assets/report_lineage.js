"use strict";
// What a run was made of, and what was made of it: boxes from left to right, each behind all that it needs.
(function () {
  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 236, HEIGHT = 50, ACROSS = 70, DOWN = 14;

  function svg(tag, attributes, ...children) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const short = (text, most) => (text.length <= most ? text : `\u2026${text.slice(1 - most)}`);

  Nemotron.lineage = function ({ nodes, links, roots }) {
    const depth = depths(nodes, links), columns = [], places = new Map();
    for (const node of nodes) (columns[depth.get(node.id)] ||= []).push(node);
    const most = Math.max(...columns.map((column) => column.length));
    const height = most * (HEIGHT + DOWN) + DOWN, width = columns.length * (WIDTH + ACROSS) - ACROSS + 20;
    columns.forEach((column, i) => column.forEach((node, j) => {
      const top = (height - column.length * (HEIGHT + DOWN) + DOWN) / 2;
      places.set(node.id, [10 + i * (WIDTH + ACROSS), top + j * (HEIGHT + DOWN)]);
    }));
    const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Lineage" });
    for (const link of links) {
      const [x0, y0] = places.get(link.maker), [x1, y1] = places.get(link.user);
      const from = x0 + WIDTH, a = y0 + HEIGHT / 2, b = y1 + HEIGHT / 2, bend = Math.max(30, (x1 - from) / 2);
      root.append(svg("path", { d: `M${from},${a} C${from + bend},${a} ${x1 - bend},${b} ${x1},${b}` },
        svg("title", {}, `${link.type} at ${link.key}`)));
    }
    for (const node of nodes) {
      const [x, y] = places.get(node.id);
      const kind = node.kind === "run" ? (roots.includes(node.id) ? "root" : "run") : "source";
      const more = node.kind === "run" ? `${node.step} -c ${node.config}${node.state ? `, ${node.state}` : ""}`
        : node.kind === "forgotten" ? "forgotten" : kindOf(node, links);
      root.append(svg("g", { class: kind },
        svg("rect", { x, y, width: WIDTH, height: HEIGHT, rx: 9 }),
        svg("text", { x: x + 12, y: y + 21 }, short(node.id, 29)),
        svg("text", { x: x + 12, y: y + 38, class: "soft" }, short(more, 36)),
        svg("title", {}, [node.id, more, ...(node.places || [])].filter(Boolean).join("\n"))));
    }
    const box = document.createElement("div");
    box.className = "lineage";
    box.append(root);
    return box;
  };

  const kindOf = (node, links) => links.find((link) => link.maker === node.id)?.type || "source";

  // One more than the deepest maker; what is part of a circle stays where it is found first.
  function depths(nodes, links) {
    const makers = new Map(nodes.map((node) => [node.id, []])), found = new Map();
    for (const link of links) makers.get(link.user)?.push(link.maker);
    const of = (id, above) => {
      if (found.has(id)) return found.get(id);
      if (above.has(id)) return 0;
      const below = new Set(above).add(id);
      const value = Math.max(-1, ...(makers.get(id) || []).map((maker) => of(maker, below))) + 1;
      found.set(id, value);
      return value;
    };
    for (const node of nodes) of(node.id, new Set());
    return found;
  }
})();
