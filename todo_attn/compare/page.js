"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const checked = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
  const say = (selector, text) => { const status = document.querySelector(selector); if (status) status.textContent = text; };
  root.classList.add("js");

  function describe(layer) {
    const words = document.createElement("span"), name = document.createElement("b");
    name.textContent = layer.dataset.method;
    words.append(name, " " + layer.dataset.caption);
    return words;
  }

  function divide(range) {
    range.parentElement.style.setProperty("--split", `${range.value}%`);
    range.setAttribute("aria-valuetext", `${range.value} % ${range.dataset.left}, ${100 - range.value} % ${range.dataset.right}`);
  }

  // Shows the chosen method in the chosen view.
  function show() {
    const method = checked("method"), view = checked("view") ?? "slider";
    root.dataset.view = view;
    root.style.setProperty("--brighter", view === "slider" ? 1 : view / Number(root.dataset.amplification));
    if (view !== "slider") all(".factor").forEach((factor) => { factor.textContent = view; });
    for (const stage of all(".stage")) {
      for (const layer of all(".layer:not(.reference)", stage)) layer.classList.toggle("on", layer.dataset.method === method);
      const reference = stage.querySelector(".reference"), other = stage.querySelector(".method.on");
      const covered = view !== "slider" && stage.querySelector(".difference.on") !== null;
      stage.classList.toggle("alone", !reference || !other || covered);
      stage.nextElementSibling.replaceChildren(...[reference, other].filter(Boolean).map(describe));
      const range = stage.querySelector("input");
      if (range && other) {
        range.dataset.left = reference.dataset.method;
        range.dataset.right = method;
        divide(range);
      }
    }
  }

  for (const range of all(".stage input")) range.addEventListener("input", () => divide(range));
  for (const form of all(".controls")) {
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", () => {
      show();
      const view = checked("view");
      say("#shown", checked("method") + (view === "slider" ? "" : `: difference, amplified ${view} times`));
    });
  }
  show();
  window.addEventListener("pageshow", show);  // the browser may have restored other choices

  async function copy(text, code) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {  // without permission: by selecting it
      getSelection().selectAllChildren(code);
      return document.execCommand("copy");
    }
  }
  for (const button of all(".code button")) {
    button.addEventListener("click", async () => {
      const code = button.closest(".code").querySelector("code");
      const done = await copy(code.textContent, code);
      button.textContent = done ? "Copied" : "Press Ctrl+C";
      say("#copied", button.textContent);
      setTimeout(() => { button.textContent = "Copy"; say("#copied", ""); }, 2000);
    });
  }
})();
