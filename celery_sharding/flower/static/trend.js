/* A line over the last ten minutes, in SVG, with gaps while the shard had no owner. */
window.drawTrend = (function () {
  "use strict";

  const WINDOW_MS = 600000, GAP_MS = 15000, WIDTH = 600, HEIGHT = 160, LEFT = 44, BOTTOM = 18, TOP = 8;
  const NS = "http://www.w3.org/2000/svg";

  function make(tag, facts, text) {
    const element = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(facts)) { element.setAttribute(name, value); }
    if (text !== undefined) { element.textContent = text; }
    return element;
  }

  /* The smallest of 1, 2, 5, 10 … that is not smaller than it. */
  function ceiling(value) {
    const power = Math.pow(10, Math.floor(Math.log10(Math.max(value, 1e-9))));
    return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
  }

  return function (svg, points, now, write, name) {
    const largest = Math.max(0, ...points.map((point) => point.value)), top = ceiling(Math.max(largest, 1));
    const x = (at) => LEFT + (WIDTH - LEFT) * (1 - (now - at) / WINDOW_MS);
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top);
    const parts = [];
    for (const value of [0, top / 2, top]) {
      parts.push(make("line", { class: "shards-axis", x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value) }));
      parts.push(make("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, write(value)));
    }
    for (const minutes of [10, 5, 0]) {
      const anchor = { 10: "start", 5: "middle", 0: "end" }[minutes];
      const label = minutes ? "−" + minutes + " min" : "now";
      parts.push(make("text", { x: x(now - minutes * 60000), y: HEIGHT - 2, "text-anchor": anchor }, label));
    }
    let path = "", before = null;
    for (const point of points) {
      if (point.at >= now - WINDOW_MS) {
        path += (before !== null && point.at - before <= GAP_MS ? "L" : "M") + x(point.at).toFixed(1) + " "
          + y(point.value).toFixed(1);
        before = point.at;
      }
    }
    parts.push(make("path", { class: "shards-line", d: path }));
    const last = points.length ? write(points[points.length - 1].value) : "none";
    svg.setAttribute("viewBox", "0 0 " + WIDTH + " " + HEIGHT);
    svg.setAttribute("preserveAspectRatio", "xMinYMin meet");
    svg.setAttribute("aria-label", name + ": last " + last + ", largest " + write(largest));
    svg.replaceChildren(...parts);
  };
}());
