"""What models cost, beside what the papers print."""
