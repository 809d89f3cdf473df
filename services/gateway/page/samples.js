/** Images that come with the page, and questions that the shipped model can answer about them. */

export const SAMPLES = [
  {
    file: "cards.png",
    name: "Cards",
    alt: "Poster with a green star, a pink triangle, an orange diamond, and red, pink and yellow cards",
    questions: ["What number is on the red card?", "What word is on the yellow card?", "Where is the diamond?"],
  },
  {
    file: "table.png",
    name: "Table",
    alt: "Poster with a table of words and numbers, patterns, a diamond, and three cards",
    questions: ["Which row of the table has the number 14?", "Read the table: row hat, column A.",
                "Where is the yellow card?"],
  },
  {
    file: "keys.png",
    name: "Keypad",
    alt: "Poster with a small keypad of four keys, a pattern, shapes, and three cards",
    questions: ["Which number does the blue key show?", "What color is the card with the word fox?", "Count the cards."],
  },
  {
    file: "chart.png",
    name: "Chart",
    alt: "Poster with a bar chart of four bars, a panel of symbols, a circle, and three cards",
    questions: ["Which bar of the chart is the tallest?", "Read the purple bar of the chart.",
                "What word is on the blue card?"],
  },
];
