// How many levels of a pyramid one launch takes.
#pragma once

constexpr int MOST_LEVELS = 8;  // a power of 2
