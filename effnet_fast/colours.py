"""Okabe and Ito's colours, which colour-blind readers can tell apart, and a grey."""

ORANGE, BLUE, GREEN, PINK, AMBER, SKY, YELLOW = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"
BLACK, GREY = "#000000", "#888888"
