/* The tensors of a case as a device holds them; private to harness/problem_device*.c. */
#ifndef KL_HARNESS_PROBLEM_DEVICE_H
#define KL_HARNESS_PROBLEM_DEVICE_H

#include "harness/problem_build.h"

/* In which type a tensor lies on the device: the placement's type of activations, or of states, or float, or the type that it
 * has on the host already, as weights and latents do. All but the last are float on the host. */
typedef enum kl_part_kind { KL_PART_ACTIVATION, KL_PART_STATE, KL_PART_PLAIN, KL_PART_STORED } kl_part_kind;

/* One tensor [rows,width], on the host dense. */
typedef struct kl_part {
    const char *name;
    kl_part_kind kind;
    const void *in;        /* what the variant reads; NULL: nothing */
    float *out;            /* what it writes */
    bool gradient, accumulates;
    const void *field[2];  /* where the problem points to it */
    int64_t *stride;       /* the problem's stride, where it has one */
    void **table;          /* [rows]: the problem points to these pointers, one a row; NULL: to the tensor itself */
    bool tabled;
    int64_t rows, width;
    kl_dtype dtype;
    int64_t pitch;         /* elements from row to row */
    size_t bytes;
    unsigned char *before; /* its bytes on the device before a run */
    void *memory;
} kl_part;

enum { KL_PARTS = 24 };

typedef struct kl_image {
    const kl_ctx *ctx;
    kl_case on;            /* the case with the device's pointers */
    int count;
    kl_part part[KL_PARTS];
    int64_t *slot;         /* [N] where sequence n's state lies in the pool; NULL: n */
    void *slots;           /* the same on the device */
} kl_image;

/* Enters a tensor that the case reads (in), writes (out) or both; neither: nothing is entered and NULL returned. */
kl_part *kl_part_add(kl_image *im, const kl_case *c, const char *name, kl_part_kind kind, const void *in, void *out, const void *field, int64_t *stride,
                     int64_t rows, int64_t width);
/* One that lies on the device as on the host. */
kl_part *kl_part_add_stored(kl_image *im, const kl_case *c, const char *name, kl_dtype dtype, const void *in, const void *field, int64_t rows, int64_t width);
/* The problem's field points to a table of pointers to the rows. */
void kl_part_through_table(kl_part *p);

/* Enters every tensor of the case. */
kl_status kl_parts_list(kl_image *im, const kl_case *c);

/* Slots of the pool are taken from the last on, leaving every other one to nobody. */
static inline int64_t kl_pool_slots(int64_t N) { return 2 * N + 1; }
static inline int64_t kl_pool_slot(int64_t N, int64_t n) { return 2 * (N - n) - 1; }

#endif
