"""What type checkers have to refuse: every line that is marked is an error, and no other is."""

from kvcomp import KIVI, CompressedCache, SnapKV, Stack
from kvcomp import KIWI as KIWI  # error
from kvcomp.stages import Nothing as Nothing  # error

SnapKV(keep="half")  # error
KIVI(bit=4)  # error
KIVI(bits=4) + "kivi"  # error
"kivi" + KIVI(bits=4)  # error
SnapKV + KIVI  # error
Stack.parse(KIVI)  # error
CompressedCache(4, None)  # error
KIVI().bits = 2  # error
