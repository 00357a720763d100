/* What both pages do: fetch their data repeatedly, say how old it is, and act after a confirmation.

   States: asking (every 2 s) -> hidden tab: resting -> shown again: asking at once. An answer that does not come, or
   says that the broker is away, leaves what is shown and puts its age in the banner. */
window.Shards = (function () {
  "use strict";

  const EVERY_MS = 2000, PATIENCE_MS = 10000;
  const page = document.getElementById("shards-page");
  const states = JSON.parse(page.dataset.states);
  const refused = page.dataset.refused;
  // Not found when only little is wrong: "no standby" has no sign.
  const SIGNS = { unowned: "!", stuck: "!", missing: "!", paused: "‖" };
  let show = null, timer = null, asking = null, takenAt = null, trouble = "";

  // --- texts

  function duration(seconds) {
    if (seconds < 9.95) { return seconds > 0 ? seconds.toFixed(1) + "s" : "0s"; }
    const whole = Math.round(seconds), two = (n) => String(Math.floor(n)).padStart(2, "0");
    if (whole < 60) { return whole + "s"; }
    if (whole < 3600) { return Math.floor(whole / 60) + "m" + two(whole % 60) + "s"; }
    if (whole < 86400) { return Math.floor(whole / 3600) + "h" + two(whole % 3600 / 60) + "m"; }
    return Math.floor(whole / 86400) + "d" + two(whole % 86400 / 3600) + "h";
  }

  const known = (value, write) => (value === null || value === undefined ? "–" : write(value));
  const number = (value) => known(value, (n) => n.toLocaleString());
  const rate = (value) => known(value, (n) => (n < 99.95 ? n.toFixed(1) : n.toFixed(0)));
  const lag = (row) => (row.lag_seconds === null ? "?" : (row.lag_estimated ? "~" : "") + duration(row.lag_seconds));

  /* Write only what changed, to spare selections and screen readers. */
  function put(element, text) {
    if (element.textContent !== String(text)) { element.textContent = text; }
  }

  function set(element, name, value) {
    if (value === null || value === undefined) { element.removeAttribute(name); }
    else if (element.getAttribute(name) !== String(value)) { element.setAttribute(name, value); }
  }

  function make(tag, facts, ...children) {
    const element = Object.assign(document.createElement(tag), facts || {});
    element.append(...children);
    return element;
  }

  function describeState(element, state) {
    const words = states[state] || { meaning: "", advice: "" };
    element.classList.add("shards-state");
    put(element, state);
    set(element, "title", words.meaning + (words.advice ? "; " + words.advice : ""));
    set(element, "data-alarm", SIGNS[state]);
  }

  // Flower may serve under a prefix, which every address from a template has.
  const prefix = page.dataset.shards.replace(/\/shards$/, "");
  const workerUrl = (name) => prefix + "/worker/" + encodeURIComponent(name);
  const taskUrl = (id) => prefix + "/task/" + encodeURIComponent(id);

  // --- asking

  // Without the password that the page's own address may contain: scripts may not fetch such an address.
  const whole = (path) => location.origin + path;

  async function ask() {
    clearTimeout(timer);
    if (asking !== null || document.hidden) { return; }
    asking = new AbortController();
    const limit = setTimeout(() => asking.abort(), PATIENCE_MS);
    let found = null;
    try {
      const answer = await fetch(whole(page.dataset.url), { signal: asking.signal, cache: "no-store" });
      if (answer.redirected || answer.status === 401 || answer.status === 403) {
        throw new Error("You are no longer logged in; reload this page.");
      }
      if (!answer.ok) { throw new Error("Flower answered with an error (" + answer.status + ")."); }
      found = await answer.json();
      takenAt = found.age_seconds === null ? null : Date.now() - found.age_seconds * 1000;
      trouble = found.error ? "The broker cannot be read: " + found.error + "." : "";
    } catch (error) {
      trouble = error instanceof TypeError || error.name === "AbortError" ? "Flower does not answer." : error.message;
    } finally {
      clearTimeout(limit);
      asking = null;
    }
    timer = setTimeout(ask, EVERY_MS);
    tellAge();
    if (found !== null) { show(found); }
  }

  function tellAge() {
    const banner = document.getElementById("shards-banner");
    banner.hidden = trouble === "";
    put(document.getElementById("shards-banner-what"), trouble);
    const age = takenAt === null ? "Nothing is known yet."
      : "The data is " + duration((Date.now() - takenAt) / 1000) + " old.";
    put(document.getElementById("shards-banner-age"), trouble ? age : "");
  }

  function start(shower) {
    show = shower;
    document.addEventListener("visibilitychange", ask);
    setInterval(tellAge, 1000);
    ask();
  }

  // --- acting

  function tell(text, kind) {
    const note = document.getElementById("shards-note");
    note.className = "alert alert-" + kind;
    note.hidden = false;
    put(note, text);
  }

  async function post(path) {
    const token = document.cookie.match(/(?:^|;\s*)_xsrf=([^;]+)/);
    const headers = { [page.dataset.header]: "shards" };
    if (token) { headers["X-XSRFToken"] = decodeURIComponent(token[1]); }
    try {
      const answer = await fetch(whole(page.dataset.api + path), { method: "POST", headers: headers });
      const text = await answer.text();
      if (answer.ok) { tell(JSON.parse(text).message, "success"); } else { tell(text.trim() || answer.statusText, "danger"); }
    } catch (error) {
      tell("Flower does not answer; the history says whether it was done.", "danger");
    }
    ask();
  }

  /* Let a button ask `question`, then post; while actions are refused it is disabled and says why. */
  function act(button, question) {
    if (refused) {
      button.disabled = true;
      button.title = "Off: " + refused;
      return;
    }
    button.addEventListener("click", function () {
      const asked = question(), element = document.getElementById("shards-confirm");
      const modal = window.bootstrap.Modal.getOrCreateInstance(element);
      const yes = document.getElementById("shards-confirm-yes");
      put(document.getElementById("shards-confirm-title"), asked.title);
      put(document.getElementById("shards-confirm-text"), asked.text);
      put(yes, asked.verb);
      yes.onclick = function () { modal.hide(); post(asked.path); };
      element.addEventListener("hidden.bs.modal", () => button.focus(), { once: true });
      modal.show();
    });
  }

  /* Show a button only where it has an effect. */
  function offer(button, possible) { button.hidden = !possible; }

  const WHAT = {
    pause: "No more of its tasks start, in any worker, until it is resumed. Running tasks may end; messages wait in order.",
    resume: "Its messages run again, from the first waiting one.",
  };

  function pausing(verb, place) {
    return { title: verb.charAt(0).toUpperCase() + verb.slice(1) + " " + place + "?", text: WHAT[verb], verb: verb,
      path: "/" + place + "/" + verb };
  }

  return { act, describeState, duration, known, lag, make, number, offer, pausing, put, rate, set, start, taskUrl, workerUrl,
    SIGNS, page };
}());
