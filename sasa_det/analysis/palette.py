"""Colours of figures, told apart with any kind of colour vision (Okabe and Ito)."""

COLOURS = ("#555555", "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#009E73")
