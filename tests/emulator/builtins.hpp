// Included before everything else in the emulator's own files: what these call memcpy and so on, by name or because the
// compiler copies a structure or takes a loop for a copy, are functions of bytes.cpp. Those of the C library are watched by
// the sanitizers wherever they are called from, and what the emulator does for itself is not for them to see.
#pragma once

asm("memcpy = emulator_memcpy\n"
    "memmove = emulator_memmove\n"
    "memset = emulator_memset\n"
    "memcmp = emulator_memcmp\n"
    "bcmp = emulator_memcmp\n"
    "strlen = emulator_strlen\n");
