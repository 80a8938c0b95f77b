/* The golden gradients carry the run-time names of the model that made them: some of those parameters are several of
 * ours stacked. Each is compared slice by slice with the parameters that it is made of. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness/verify_model.h"

/* Our gradients by released name. */
typedef struct grad_entry {
    char *name;
    const float *data;
    int64_t count;
    bool trained, seen;
} grad_entry;

typedef struct grad_list {
    grad_entry *entry;
    int count, room;
} grad_list;

static kl_status enter(void *user, const kl_param_info *info, kl_param *param)
{
    grad_list *l = user;
    if (l->count == l->room) {
        grad_entry *more = realloc(l->entry, (size_t)(2 * l->room + 64) * sizeof *more);
        if (!more)
            return kl_error(KL_ENOMEM, "out of memory");
        l->entry = more;
        l->room = 2 * l->room + 64;
    }
    char *name = strdup(info->name);
    if (!name)
        return kl_error(KL_ENOMEM, "out of memory");
    l->entry[l->count++] = (grad_entry){name, param->data, param->rows * param->columns, info->trained, false};
    return kl_ok();
}

static grad_entry *by_name(grad_list *l, const char *name)
{
    for (int i = 0; i < l->count; i++)
        if (strcmp(l->entry[i].name, name) == 0)
            return &l->entry[i];
    return NULL;
}

/* text with the first `from` replaced; false when `from` is not in it. */
static bool replaced(char *out, size_t size, const char *text, const char *from, const char *to)
{
    const char *at = strstr(text, from);
    if (!at)
        return false;
    snprintf(out, size, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    return true;
}

/* Run-time names that differ from the released ones but hold the same tensor. */
static void released_name(char *out, size_t size, const char *name)
{
    static const char *const change[][2] = {{".self_attn.forget_gate.", ".self_attn."},
                                            {".mlp.gate.", ".block_sparse_moe.gate."},
                                            {".mlp.shared_experts.", ".block_sparse_moe.shared_experts."}};
    for (int i = 0; i < 3; i++)
        if (replaced(out, size, name, change[i][0], change[i][1]))
            return;
    snprintf(out, size, "%s", name);
}

typedef struct slices {
    grad_list *list;
    const kl_tensor *want;
    float *got;      /* [count of want], put together from our parameters */
    int64_t filled;
} slices;

/* The next part of the stacked tensor. */
static kl_status append(slices *s, const char *name)
{
    grad_entry *e = by_name(s->list, name);
    if (!e)
        return kl_error(KL_EFORMAT, "tensor '%s': the model has no parameter '%s'", s->want->name, name);
    if (e->count > kl_tensor_count(s->want) - s->filled)
        return kl_error(KL_EFORMAT, "tensor '%s': expected a larger shape for parameter '%s'", s->want->name, name);
    memcpy(s->got + s->filled, e->data, (size_t)e->count * sizeof *s->got);
    s->filled += e->count;
    e->seen = true;
    return kl_ok();
}

static kl_status gather(slices *s, const char *name, int64_t experts)
{
    static const char *const conv[] = {".q_conv1d.weight", ".k_conv1d.weight", ".v_conv1d.weight"};
    char part[256], to[96];
    if (strstr(name, ".self_attn.conv1d.weight")) {
        for (int i = 0; i < 3; i++) {
            snprintf(to, sizeof to, ".self_attn%s", conv[i]);
            replaced(part, sizeof part, name, ".self_attn.conv1d.weight", to);
            KL_TRY(append(s, part));
        }
        return kl_ok();
    }
    bool down = strstr(name, ".mlp.experts.down_proj") != NULL;
    if (down || strstr(name, ".mlp.experts.gate_up_proj")) {
        static const char *const gate_up[] = {"w1", "w3"};
        for (int64_t e = 0; e < experts; e++) {
            for (int i = 0; i < (down ? 1 : 2); i++) {
                snprintf(to, sizeof to, ".block_sparse_moe.experts.%lld.%s.weight", (long long)e, down ? "w2" : gate_up[i]);
                replaced(part, sizeof part, name, down ? ".mlp.experts.down_proj" : ".mlp.experts.gate_up_proj", to);
                KL_TRY(append(s, part));
            }
        }
        return kl_ok();
    }
    released_name(part, sizeof part, name);
    return append(s, part);
}

static kl_status compare(kl_verifier *v, const kl_golden_model *g, grad_list *list, const kl_tensor *want, const char *variant)
{
    size_t n = (size_t)kl_tensor_count(want);
    KL_REQUIRE(want->dtype == KL_F32 || want->dtype == KL_BF16, "tensor '%s': expected float32 or bfloat16, got %s", want->name, kl_dtype_name(want->dtype));
    float *got = malloc((n + 1) * sizeof *got), *right = malloc((n + 1) * sizeof *right);
    slices s = {list, want, got, 0};
    kl_status status = got && right ? gather(&s, want->name + strlen("grad."), g->model->config.num_experts) : kl_error(KL_ENOMEM, "out of memory");
    if (!kl_failed(status) && s.filled != (int64_t)n)
        status = kl_error(KL_EFORMAT, "tensor '%s': expected %lld elements for the model's parameters, got %zu", want->name, (long long)s.filled, n);
    if (!kl_failed(status)) {
        kl_to_f32(right, want->data, want->dtype, n);
        double limit = (want->dtype == KL_BF16 ? kl_tol_golden_bf16_grad : kl_tol_model_f32).gradient;
        const char *name = want->name + (strncmp(want->name, "grad.model.", 11) == 0 ? 11 : 5);
        char label[256];
        snprintf(label, sizeof label, "grad.%s", name);
        kl_verify_row(v, &(kl_check){"model", variant, label, kl_rel_err_f32(got, right, n), NAN, limit, NULL});
    }
    free(got);
    free(right);
    return status;
}

kl_status kl_verify_model_grads(kl_verifier *v, const kl_golden_model *g, kl_weights *grads, const char *variant)
{
    grad_list list = {0};
    kl_status s = kl_weights_each(&g->model->config, grads, enter, &list);
    for (int i = 0; !kl_failed(s) && i < kl_tensors_size(g->file); i++) {
        const kl_tensor *t = kl_tensors_at(g->file, i);
        if (strncmp(t->name, "grad.", 5) == 0)
            s = compare(v, g, &list, t, variant);
    }
    for (int i = 0; i < list.count; i++) {
        if (!kl_failed(s) && list.entry[i].trained && !list.entry[i].seen)
            kl_verify_fact(v, "model", variant, list.entry[i].name, false, "the file holds no gradient of this parameter");
        free(list.entry[i].name);
    }
    free(list.entry);
    return s;
}
