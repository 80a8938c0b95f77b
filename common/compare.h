/* How far a result is from the reference, phrased so that NaN and infinity fail. */
#ifndef KL_COMMON_COMPARE_H
#define KL_COMMON_COMPARE_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ||x - ref|| / ||ref|| in double. Zero reference: ||x||. NaN or Inf anywhere in x: NaN
 * (also where ref holds the same one: a result that is not finite is never right). */
double kl_rel_err(const float *x, const double *ref, size_t n);
double kl_rel_err_f32(const float *x, const float *ref, size_t n);

/* The same for sums that may cancel: terms [n] are the sums of the absolute values of what each ref is the sum of. An element is scored
 * against max(|ref|, kl_tol_cancelled * terms). */
double kl_rel_err_sums(const float *x, const double *ref, const double *terms, size_t n);

/* The worst kl_rel_err over blocks of a [T, H, D] tensor: one score for each head in each window
 * of `window` tokens, so that one broken head or one broken stretch of time cannot hide in the
 * whole. A block is scored against max(||its ref||, floor * ||whole ref|| / sqrt(blocks)), floor
 * 0.05: blocks that are nearly zero by nature do not dominate. */
double kl_rel_err_blocks(const float *x, const double *ref, size_t T, size_t H, size_t D, size_t window);

static inline bool kl_within(double err, double limit) { return err <= limit; } /* false for NaN */

/* Relative tolerances by what was computed in which precision; tests, verify and bench read only this. */
typedef struct kl_tolerance {
    const char *what;
    double forward, gradient;
    const char *why;
} kl_tolerance;
extern const kl_tolerance kl_tol_kda_f32, kl_tol_kda_bf16, kl_tol_kda_bf16_corr;
extern const kl_tolerance kl_tol_mla_f32, kl_tol_mla_bf16, kl_tol_moe_f32, kl_tol_moe_bf16, kl_tol_model_f32, kl_tol_model_bf16, kl_tol_golden_bf16_grad;
extern const double kl_tol_cancelled;
extern const kl_tolerance kl_tol_layers_f32, kl_tol_layers_bf16, kl_tol_muon;

#ifdef __cplusplus
}
#endif
#endif
