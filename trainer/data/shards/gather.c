/* Runs of bytes to their places, past the cache: what is written here is read once, later, by another core.
   A plain memcpy reads every line of the target before it writes it (13 ms for 128 MB in runs of 32 kB; this: 9.5). */

#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>

enum { LINE = 64, AHEAD = 1024 }; /* bytes */

static void copy(char *to, const char *from, int64_t size) {
    int64_t head = -(uintptr_t)to & (LINE - 1);
    if (head > size) head = size;
    memcpy(to, from, head);
    to += head, from += head, size -= head;
    for (; size >= LINE; size -= LINE, to += LINE, from += LINE) {
        __builtin_prefetch(from + AHEAD);
        const __m128i *source = (const __m128i *)from;
        __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        __m128i *target = (__m128i *)to;
        _mm_stream_si128(target, a), _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c), _mm_stream_si128(target + 3, d);
    }
    memcpy(to, from, size);
}

#define FINISH _mm_sfence()
#else
#define copy memcpy
#define FINISH (void)0
#endif

/* Copies bytes[i] bytes from source[i] to target + place[i], for every i < runs. */
void gather(int64_t runs, const char *const *source, const int64_t *place, const int64_t *bytes, char *target) {
    for (int64_t i = 0; i < runs; i++) copy(target + place[i], source[i], bytes[i]);
    FINISH;
}
