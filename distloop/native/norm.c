/* The sum of squares of a row in bf16, added up in double precision: torch widens the row in memory first. */
#include <stdint.h>
#include <string.h>

#define LANES 16

/* Return it for `count` elements; its bits depend on them alone, not on where they lie. */
double dl_squares(const uint16_t *row, int64_t count) {
    double lanes[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        uint32_t bits[LANES];
        float wide[LANES];
        for (int j = 0; j < LANES; j++) bits[j] = (uint32_t)row[i + j] << 16;
        memcpy(wide, bits, sizeof wide);
        for (int j = 0; j < LANES; j++) lanes[j] += (double)wide[j] * wide[j];
    }
    for (; i < count; i++) {
        uint32_t bits = (uint32_t)row[i] << 16;
        float wide;
        memcpy(&wide, &bits, sizeof wide);
        sum += (double)wide * wide;
    }
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}
