// Lists of the registers of wgmma's sums, by the number of columns / 16: for the instruction's text, and as operands.
// Included by wgmma.cuh.
#pragma once

#define ATTN_SUMS_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ATTN_SUMS_2 ATTN_SUMS_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ATTN_SUMS_3 ATTN_SUMS_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define ATTN_SUMS_4 ATTN_SUMS_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTN_SUMS_5 ATTN_SUMS_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define ATTN_SUMS_6 ATTN_SUMS_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define ATTN_SUMS_7 ATTN_SUMS_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define ATTN_SUMS_8 ATTN_SUMS_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define ATTN_SUMS_9 ATTN_SUMS_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define ATTN_SUMS_10 ATTN_SUMS_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define ATTN_SUMS_11 ATTN_SUMS_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define ATTN_SUMS_12 ATTN_SUMS_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define ATTN_SUMS_13 ATTN_SUMS_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define ATTN_SUMS_14 ATTN_SUMS_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define ATTN_SUMS_15 ATTN_SUMS_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define ATTN_SUMS_16 ATTN_SUMS_15 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define ATTN_SUM(i) "+f"(d[i])
#define ATTN_8_SUMS(i)                                                                                          \
    ATTN_SUM(i), ATTN_SUM(i + 1), ATTN_SUM(i + 2), ATTN_SUM(i + 3), ATTN_SUM(i + 4), ATTN_SUM(i + 5), ATTN_SUM(i + 6), \
        ATTN_SUM(i + 7)
#define ATTN_OPERANDS_1 ATTN_8_SUMS(0)
#define ATTN_OPERANDS_2 ATTN_OPERANDS_1, ATTN_8_SUMS(8)
#define ATTN_OPERANDS_3 ATTN_OPERANDS_2, ATTN_8_SUMS(16)
#define ATTN_OPERANDS_4 ATTN_OPERANDS_3, ATTN_8_SUMS(24)
#define ATTN_OPERANDS_5 ATTN_OPERANDS_4, ATTN_8_SUMS(32)
#define ATTN_OPERANDS_6 ATTN_OPERANDS_5, ATTN_8_SUMS(40)
#define ATTN_OPERANDS_7 ATTN_OPERANDS_6, ATTN_8_SUMS(48)
#define ATTN_OPERANDS_8 ATTN_OPERANDS_7, ATTN_8_SUMS(56)
#define ATTN_OPERANDS_9 ATTN_OPERANDS_8, ATTN_8_SUMS(64)
#define ATTN_OPERANDS_10 ATTN_OPERANDS_9, ATTN_8_SUMS(72)
#define ATTN_OPERANDS_11 ATTN_OPERANDS_10, ATTN_8_SUMS(80)
#define ATTN_OPERANDS_12 ATTN_OPERANDS_11, ATTN_8_SUMS(88)
#define ATTN_OPERANDS_13 ATTN_OPERANDS_12, ATTN_8_SUMS(96)
#define ATTN_OPERANDS_14 ATTN_OPERANDS_13, ATTN_8_SUMS(104)
#define ATTN_OPERANDS_15 ATTN_OPERANDS_14, ATTN_8_SUMS(112)
#define ATTN_OPERANDS_16 ATTN_OPERANDS_15, ATTN_8_SUMS(120)
