/* The page of one shard. */
(function () {
  "use strict";

  const { act, describeState, duration, known, lag, make, number, offer, pausing, put, rate, start } = window.Shards;
  const { taskUrl, workerUrl } = window.Shards;
  const section = document.getElementById("shard"), place = section.dataset.group + "/" + section.dataset.index;
  const find = (id) => document.getElementById(id);
  const shown = {};

  for (const verb of ["pause", "resume"]) {
    act(section.querySelector("[data-action=" + verb + "]"), () => pausing(verb, place));
    offer(section.querySelector("[data-action=" + verb + "]"), false);
  }

  /* Replace the children of a list only if their text has changed, so that links keep the focus. */
  function fill(id, facts, write) {
    const now = JSON.stringify(facts);
    if (shown[id] !== now) {
      shown[id] = now;
      find(id).replaceChildren(...write(facts));
    }
  }

  function writeConsumers(facts) {
    const item = (name, role) => make("li", {}, make("a", { href: workerUrl(name) }, name), " " + role);
    const owner = facts.owner ? [item(facts.owner, "owner since " + new Date(facts.since).toLocaleString())] : [];
    const all = [...owner, ...facts.standbys.map((name) => item(name, "stands by"))];
    return all.length ? all : [make("li", {}, "nobody")];
  }

  function writeTasks(facts) {
    const items = facts.tasks.map((task) =>
      make("li", {}, make("a", { href: taskUrl(task.task_id) }, task.task), " " + task.task_id));
    const rest = facts.running - facts.tasks.length;
    if (rest > 0) { items.push(make("li", {}, number(rest) + (items.length ? " more" : ""), " without events in Flower")); }
    return items.length ? items : [make("li", {}, "none")];
  }

  function writeEvents(events) {
    const rows = events.map(function (event) {
      const what = { failure: "failed: " + event.error, dead: "dead letter: " + event.reason,
        handover: event.change + (event.to ? " to " + event.to : "") }[event.event];
      const task = make("td");
      if (event.task_id) { task.append(make("a", { href: taskUrl(event.task_id), title: event.task_id }, event.task || event.task_id)); }
      return make("tr", {}, make("td", {}, new Date(event.at).toLocaleTimeString()), make("td", {}, what),
        make("td", {}, event.owner), task);
    });
    return rows.length ? rows : [make("tr", {}, make("td", { colSpan: 4 }, "nothing in the last ten minutes"))];
  }

  function plot(found, id, field, write, name) {
    const points = found.trend.map((point) => ({ at: Date.parse(point.at), value: point[field] }));
    window.drawTrend(find(id), points, Date.parse(found.at), write, name);
  }

  start(function (found) {
    if (found.hint) { put(find("shard-meaning"), found.hint); }
    const row = found.shard;
    if (row === null) { return; }
    describeState(find("shard-state"), row.state);
    const away = row.store_away_since
      ? " The claim store is unreachable since " + new Date(row.store_away_since).toLocaleTimeString() + "; "
        + number(row.store_waiting) + " messages wait for it in their lanes." : "";
    put(find("shard-meaning"), find("shard-state").title + "." + away);
    const facts = { ready: number(row.ready), unacknowledged: number(row.unacknowledged), running: number(row.running),
      lag: lag(row), in: rate(row.in_rate), out: rate(row.out_rate), clear: known(row.clear_seconds, duration) };
    for (const [name, text] of Object.entries(facts)) { put(section.querySelector("[data-fact=" + name + "]"), text); }
    put(find("shard-queue"), row.queue);
    fill("shard-consumers", { owner: row.owner, since: row.since, standbys: row.standbys }, writeConsumers);
    fill("shard-tasks", { tasks: found.tasks, running: row.running || 0 }, writeTasks);
    fill("shard-events", found.events, writeEvents);
    plot(found, "shard-lag", "lag_seconds", duration, "Lag");
    plot(found, "shard-rate", "done_rate", (value) => value.toFixed(1), "Messages done per second");
    offer(section.querySelector("[data-action=pause]"), row.state !== "paused");
    offer(section.querySelector("[data-action=resume]"), row.state === "paused");
  });
}());
