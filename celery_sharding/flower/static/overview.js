/* The page of all groups. The row of a queue is made once and then updated, so that it keeps the focus. */
(function () {
  "use strict";

  const { act, describeState, duration, known, lag, make, number, offer, pausing, put, rate, set, SIGNS } = window.Shards;
  const LAGS = [
    { below: 1, text: "lag below 1 s", height: 14 },
    { below: 10, text: "below 10 s", height: 36 },
    { below: 60, text: "below 1 min", height: 58 },
    { below: 600, text: "below 10 min", height: 80 },
    { below: Infinity, text: "10 min and more", height: 100 },
  ];
  const age = (row, now) => known(row.since, (since) => duration(Math.max(0, (now - Date.parse(since)) / 1000)));
  const COLUMNS = [
    { title: "Shard", sort: (row) => row.order },
    { title: "State", sort: (row) => row.state },
    { title: "Ready", number: true, sort: (row) => row.ready, text: (row) => number(row.ready) },
    { title: "Unacked", number: true, sort: (row) => row.unacknowledged, text: (row) => number(row.unacknowledged) },
    { title: "Running", number: true, sort: (row) => row.running, text: (row) => number(row.running) },
    { title: "Lag", number: true, sort: (row) => row.lag_seconds, text: lag },
    { title: "In/s", number: true, sort: (row) => row.in_rate, text: (row) => rate(row.in_rate) },
    { title: "Out/s", number: true, sort: (row) => row.out_rate, text: (row) => rate(row.out_rate) },
    { title: "Clear", number: true, sort: (row) => row.clear_seconds, text: (row) => known(row.clear_seconds, duration) },
    { title: "Owner", sort: (row) => row.owner, text: (row) => row.owner || "–" },
    { title: "Standbys", sort: (row) => row.standbys.join(" "), text: standbys },
    { title: "Since", number: true, sort: (row) => row.since && -Date.parse(row.since), text: age },
  ];
  const groups = new Map();

  function standbys(row) {
    return row.standbys.length ? row.standbys[0] + (row.standbys.length > 1 ? " +" + (row.standbys.length - 1) : "") : "–";
  }

  function paint(bar, row) {
    const level = row.lag_seconds === null ? -1 : LAGS.findIndex((each) => row.lag_seconds < each.below);
    bar.style.setProperty("--colour", "var(--lag-" + (level < 0 ? "unknown" : level) + ")");
    bar.style.setProperty("--height", (level < 0 ? 100 : LAGS[level].height) + "%");
    set(bar, "data-alarm", SIGNS[row.state]);
  }

  function makeLegend(list) {
    const samples = [0, 5, 30, 300, 3600, null];
    for (const [level, text] of [...LAGS.map((each) => each.text), "not known"].entries()) {
      const bar = make("span", { className: "shards-bar" });
      paint(bar, { lag_seconds: samples[level], state: "ok" });
      list.append(make("li", {}, bar, text));
    }
    for (const [sign, text] of [["!", "unowned, stuck or missing"], ["‖", "paused"]]) {
      const bar = make("span", { className: "shards-bar" });
      bar.dataset.alarm = sign;
      list.append(make("li", {}, bar, text));
    }
  }

  function makeGroup(name) {
    const section = document.getElementById("shards-group").content.firstElementChild.cloneNode(true);
    const group = { section, name, rows: new Map(), bars: new Map(), column: 0, falling: false, last: null, order: "" };
    const find = (selector) => section.querySelector(selector);
    section.id = "group-" + name;
    find(".shards-title").textContent = name;
    makeLegend(find(".shards-legend"));
    COLUMNS.forEach(function (column, position) {
      const button = make("button", { type: "button", className: "shards-sort" }, column.title);
      button.addEventListener("click", function () {
        group.falling = group.column === position ? !group.falling : Boolean(column.number);
        group.column = position;
        sort(group);
      });
      find("thead tr").append(make("th", { scope: "col", className: column.number ? "shards-number" : "" }, button));
    });
    for (const verb of ["pause", "resume"]) {
      act(find("[data-action=" + verb + "]"), () => pausing(verb, name));
    }
    act(find("[data-action=replay]"), () => ({
      title: "Replay the dead letters of " + name + "?",
      text: "All of them, " + group.last.dead_letters + " now, are published again under their keys, behind what waits: their"
        + " place in the order is lost for good. Those whose cause persists will become dead letters again.",
      verb: "replay",
      path: "/" + name + "/dead-letters/replay",
    }));
    document.getElementById("shards-groups").append(section);
    groups.set(name, group);
    return group;
  }

  function makeRow(group, row) {
    const line = make("tr"), cells = COLUMNS.map((column) => make("td", { className: column.number ? "shards-number" : "" }));
    const url = window.Shards.page.dataset.shards + "/" + group.name + "/" + row.index;
    cells[0].append(row.kind === "live" ? make("a", { href: url, title: row.queue }, row.label) : row.label);
    cells[1].append(make("span"));
    for (const position of [9, 10]) { cells[position].append(make("span", { className: "shards-names" })); }
    line.append(...cells);
    const bar = make(row.kind === "live" ? "a" : "span", { className: "shards-bar" });
    if (row.kind === "live") {
      bar.href = url;
      bar.tabIndex = -1; // the table has the same links, for the keyboard
    }
    group.rows.set(row.queue, { line, cells, bar, row });
    return group.rows.get(row.queue);
  }

  function writeRow(shown, row, now) {
    shown.row = row;
    describeState(shown.cells[1].firstChild, row.state);
    COLUMNS.forEach(function (column, position) {
      if (column.text) {
        const cell = shown.cells[position], target = cell.firstElementChild || cell;
        put(target, column.text(row, now));
        if (cell.firstElementChild) { set(target, "title", position === 10 ? row.standbys.join(", ") : row.owner); }
      }
    });
    paint(shown.bar, row);
    const text = "shard " + row.label + ": " + row.state + ", lag " + lag(row) + ", " + number(row.ready) + " ready, owner "
      + (row.owner || "none");
    set(shown.bar, "title", text);
    set(shown.bar, "aria-label", text);
  }

  function compare(one, other, falling) {
    const blank = (value) => value === null || value === undefined || value === "";
    if (blank(one) || blank(other)) { return blank(one) - blank(other); } // what is not known comes last, either way
    const order = typeof one === "string" ? one.localeCompare(other) : one - other;
    return falling ? -order : order;
  }

  function sort(group) {
    const key = COLUMNS[group.column].sort, body = group.section.querySelector("tbody");
    const sorted = [...group.rows.values()].sort((one, other) =>
      compare(key(one.row), key(other.row), group.falling) || one.row.order - other.row.order);
    group.section.querySelectorAll("th").forEach((head, position) =>
      set(head, "aria-sort", position === group.column ? (group.falling ? "descending" : "ascending") : null));
    const order = sorted.map((shown) => shown.row.queue).join();
    if (order !== group.order) {
      const focused = document.activeElement;
      body.replaceChildren(...sorted.map((shown) => shown.line));
      if (focused !== document.activeElement && body.contains(focused)) { focused.focus({ preventScroll: true }); }
      group.order = order;
    }
  }

  function showGroup(found, now) {
    const group = groups.get(found.name) || makeGroup(found.name), section = group.section;
    group.last = found;
    const all = [...found.earlier, ...found.shards];
    all.forEach(function (row, position) {
      row.order = position;
      row.label = row.kind === "live" ? String(row.index) : row.queue.slice(("shards." + found.name + ".").length);
    });
    const queues = new Set(all.map((row) => row.queue));
    for (const [queue, shown] of group.rows) {
      if (!queues.has(queue)) {
        shown.line.remove();
        shown.bar.remove();
        group.rows.delete(queue);
      }
    }
    for (const row of all) { writeRow(group.rows.get(row.queue) || makeRow(group, row), row, now); }
    const bars = all.map((row) => group.rows.get(row.queue).bar), strip = section.querySelector(".shards-strip");
    if (bars.length !== strip.children.length || bars.some((bar, position) => strip.children[position] !== bar)) {
      strip.replaceChildren(...bars);
    }
    sort(group);
    writeFacts(section, found, all);
  }

  function writeFacts(section, found, all) {
    const lags = all.filter((row) => row.lag_seconds !== null);
    const worst = lags.reduce((most, row) => (most === null || row.lag_seconds > most.lag_seconds ? row : most), null);
    const unowned = all.filter((row) => row.state === "unowned").length;
    const facts = {
      shards: found.shards.length,
      generation: found.generation || "–",
      waiting: number(found.ready),
      lag: worst === null ? "–" : lag(worst),
      skew: known(found.skew, (skew) => skew.toFixed(1)),
      unowned: unowned,
      dead: number(found.dead_letters),
    };
    for (const [name, text] of Object.entries(facts)) { put(section.querySelector("[data-fact=" + name + "]"), text); }
    section.querySelector("[data-fact=unowned]").classList.toggle("shards-bad", unowned > 0);
    section.querySelector("[data-fact=dead]").classList.toggle("shards-bad", found.dead_letters > 0);
    const notes = [];
    if (found.switch) {
      notes.push("A switch to generation " + found.switch.generation + " with " + found.switch.shards
        + " shards is in progress, at step " + found.switch.step + ".");
    }
    if (found.limbo_ready) {
      notes.push(number(found.limbo_ready) + " messages came without a ring; a worker makes a new one for them.");
    }
    const away = all.filter((row) => row.store_away_since);
    if (away.length) {
      const since = away.map((row) => row.store_away_since).sort()[0];
      notes.push("The claim store is unreachable since " + new Date(since).toLocaleTimeString() + "; "
        + number(away.reduce((sum, row) => sum + row.store_waiting, 0)) + " messages wait for it in their lanes.");
    }
    if (found.paused) { notes.push("The whole group is paused."); }
    say(section.querySelector(".shards-switch"), notes.join(" "));
    const shards = found.name + " is not declared yet. Start a worker, or run: celery -A … shards declare " + found.name;
    say(section.querySelector(".shards-hint"), found.declared ? "" : shards);
    section.querySelectorAll(".shards-facts, .shards-card").forEach((each) => { each.hidden = !found.declared; });
    const paused = found.paused || all.some((row) => row.state === "paused");
    offer(section.querySelector("[data-action=pause]"), found.declared && !found.paused);
    offer(section.querySelector("[data-action=resume]"), paused);
    offer(section.querySelector("[data-action=replay]"), found.dead_letters > 0);
  }

  function say(element, text) {
    put(element, text);
    element.hidden = text === "";
  }

  window.Shards.start(function (found) {
    if (found.at === null) { return; }
    document.getElementById("shards-loading").hidden = true;
    for (const group of found.groups) { showGroup(group, Date.parse(found.at)); }
  });
}());
