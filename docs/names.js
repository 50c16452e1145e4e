// Gives names to parts of the theme that have none, and lets the keyboard reach boxes that scroll.
document$.subscribe(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search")
  document.querySelectorAll(".md-code__nav").forEach((nav, index) => nav.setAttribute("aria-label", `Code ${index + 1}`))
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset p:has(> img)"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0
})
