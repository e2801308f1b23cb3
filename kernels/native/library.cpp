// Which sources the library was built from, as far as callers are concerned.

#include "parallel.h"

// Raised with every change of an exported function's arguments or of a struct that they point to; functions.py has the
// number that it calls with.
LORIKEET_EXPORT int lorikeet_interface() { return 5; }
