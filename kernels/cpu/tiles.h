/* One run of tiles for one instruction set: included with LEVEL, VL (floats in a vector), TARGET and NAME(x). */

#include "vectors.h"
#include "unpack.h"
#include "loops.h"
#include "keys.h"
#include "values.h"
#include "segments.h"
#include "place.h"
#include "blocks.h"
#include "run.h"

#undef INLINE
#undef APART
#undef vf
#undef vi
#undef load
#undef store
#undef all
#undef exponential
#undef PLANES
#undef BY_ROWS
#undef Scratch
#undef Lanes
#undef Block
#undef STEP
#undef SHIFT_LEFT
#undef SHIFT_RIGHT
#undef Codes
#undef vu
#undef LEVEL
#undef NAME
#undef TARGET
#undef VL
