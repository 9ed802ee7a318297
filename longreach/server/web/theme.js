// Before anything is drawn: the theme its reader chose. Without a choice the page follows the system.
try {
  const { theme } = JSON.parse(localStorage.getItem("longreach.settings")) ?? {};
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // No storage or nothing readable in it: the system's theme.
}
