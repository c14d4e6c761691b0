// The search of the course's pages: all sections whose title and text hold every word; nothing leaves the page.
(() => {
  const MOST = 30, AROUND = 90;
  const form = document.querySelector("form[role=search]");
  const input = form.querySelector("input"), found = form.querySelector("[role=status]"), list = form.querySelector("ol");
  const plain = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();

  function matches(query) {
    const words = plain(query).split(/\s+/).filter(Boolean);
    if (!words.length) return [];
    const scored = [];
    for (const section of window.courseSections) {
      const title = plain(section.title), text = plain(section.text);
      if (!words.every((word) => title.includes(word) || text.includes(word))) continue;
      let score = title === words.join(" ") ? 100 : 0;
      for (const word of words) {
        score += title.includes(word) ? 20 : 0;
        score += Math.min(text.split(word).length - 1, 9);
      }
      scored.push([score, section, words]);
    }
    return scored.sort((a, b) => b[0] - a[0]);
  }

  function excerpt(text, words) {
    const at = Math.max(0, ...words.map((word) => plain(text).indexOf(word)));
    const from = Math.max(0, at - AROUND), to = at + AROUND;
    return (from ? "…" : "") + text.slice(from, to) + (to < text.length ? "…" : "");
  }

  function item([, section, words]) {
    const [link, place, text, line] = ["a", "span", "p", "li"].map((name) => document.createElement(name));
    link.href = section.file + (section.anchor ? "#" + section.anchor : "");
    link.textContent = section.title;
    place.textContent = section.page === section.title ? "" : " " + section.page;
    text.textContent = excerpt(section.text, words);
    line.append(link, place, text);
    return line;
  }

  function show() {
    const all = matches(input.value);
    list.replaceChildren(...all.slice(0, MOST).map(item));
    if (!input.value.trim()) found.textContent = "";
    else if (!all.length) found.textContent = "Nothing found.";
    else if (all.length === 1) found.textContent = "1 section found.";
    else found.textContent = `${all.length} sections found` + (all.length > MOST ? `, the first ${MOST} are below.` : ".");
  }

  input.addEventListener("input", show);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    list.querySelector("a")?.click();
  });
  const close = () => { input.value = ""; show(); };
  list.addEventListener("click", (event) => event.target.closest("a") && close());
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { close(); input.focus(); }
  });
  form.hidden = false;
})();
