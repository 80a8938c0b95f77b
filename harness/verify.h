/* Checks with one row each: what was checked, by which variant, how far off, and how far it may be. */
#ifndef KL_HARNESS_VERIFY_H
#define KL_HARNESS_VERIFY_H

#include "harness/problem.h"
#include "harness/report.h"

typedef struct kl_verifier {
    kl_ctx *ctx;
    kl_provenance provenance;
    bool json;        /* JSON lines on standard output instead of a table */
    bool brief;       /* one row a pass (its worst tensor) instead of one a tensor; JSON always has all */
    const char *only; /* the one variant to check; NULL: all */
    int rows, failed, unsupported;
    kl_scratch scratch;
} kl_verifier;

/* One check. blocks: the worst block's error, NaN where there are no blocks; shown, not judged. */
typedef struct kl_check {
    const char *subject, *variant, *tensor;
    double err, blocks, limit;
    const char *note; /* shown behind the row; NULL: nothing */
} kl_check;
void kl_verify_row(kl_verifier *v, const kl_check *check);
/* A thing that is either so or not: err 0 or 1 against limit 0. */
void kl_verify_fact(kl_verifier *v, const char *subject, const char *variant, const char *what, bool holds, const char *note);
/* A variant that does not offer this problem: shown, neither passed nor failed. */
void kl_verify_unsupported(kl_verifier *v, const char *subject, const char *variant, const char *why);
/* "N rows, N failed" and the status that makes the exit status. */
kl_status kl_verify_finish(kl_verifier *v);

/* Every variant of the case's family, both passes. golden: the wanted values are there, and the reference is one of the
 * variants; otherwise the reference computes them first. */
kl_status kl_verify_case(kl_verifier *v, kl_case *c, bool golden);
/* A golden file, or every one in a directory: KDA variants, the reference, and DPLR through the identity. */
kl_status kl_verify_kda_golden(kl_verifier *v, const char *path);
/* `cases` random problems over the contract's cases. */
kl_status kl_verify_random(kl_verifier *v, kl_family family, uint64_t seed, int64_t cases);
/* Case i of those of mla, rotated. */
kl_status kl_verify_rope(kl_verifier *v, uint64_t seed, int64_t i);
/* Every operation around the families. */
kl_status kl_verify_layers(kl_verifier *v);
/* One problem a family, every variant with its error and its time: a few lines to look at. */
kl_status kl_verify_summary(kl_verifier *v);
/* config.json, model.safetensors and expected.safetensors. */
kl_status kl_verify_model(kl_verifier *v, const char *dir);
/* tiktoken.model and expected.json. */
kl_status kl_verify_tokenizer(kl_verifier *v, const char *dir);

#endif
