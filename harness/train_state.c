/* Gradients and moments of a run, and its state on disk: a safetensors file that holds, for every parameter, its float
 * weight and both moments, and in its metadata what a resumed run must agree with. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "harness/file.h"
#include "harness/model_internal.h"
#include "harness/train_internal.h"

static const char STATE_FORMAT[] = "kl training state 1";
enum { TEXT = 32 };

kl_status kl_out_path(char *path, size_t size, const char *dir, const char *name)
{
    int n = snprintf(path, size, "%s/%s", dir, name);
    KL_REQUIRE(n > 0 && (size_t)n < size, "out_dir: expected a path below %zu bytes", size);
    return kl_ok();
}

/* ---- parameters side by side ---- */

static kl_status add_slot(void *user, const kl_param_info *info, kl_param *param)
{
    kl_optimizer *opt = user;
    if (opt->count == opt->room) {
        int64_t room = opt->room ? 2 * opt->room : 64;
        kl_slot *grown = realloc(opt->slots, (size_t)room * sizeof *grown);
        if (!grown)
            return kl_error(KL_ENOMEM, "optimizer: out of memory");
        opt->slots = grown;
        opt->room = room;
    }
    kl_slot *s = &opt->slots[opt->count];
    *s = (kl_slot){.name = strdup(info->name), .n = (size_t)(param->rows * param->columns), .w = param->data,
                   .decay = info->decay, .trained = info->trained};
    if (!s->name)
        return kl_error(KL_ENOMEM, "optimizer: out of memory");
    opt->count++;
    return kl_ok();
}

typedef struct cursor {
    kl_optimizer *opt;
    int64_t i;
    size_t member; /* offset of g, m or v in kl_slot */
} cursor;

static kl_status set_member(void *user, const kl_param_info *info, kl_param *param)
{
    cursor *c = user;
    (void)info;
    float *data = param->data;
    memcpy((char *)&c->opt->slots[c->i++] + c->member, &data, sizeof data);
    return kl_ok();
}

static kl_status add_member(kl_optimizer *opt, kl_weights *w, const kl_config *c, size_t member)
{
    cursor at = {.opt = opt, .member = member};
    KL_TRY(kl_weights_zeros(w, c));
    return kl_weights_each(c, w, set_member, &at);
}

kl_status kl_optimizer_open(kl_optimizer *opt, kl_weights *weights, const kl_config *c)
{
    *opt = (kl_optimizer){0};
    kl_status s = kl_weights_each(c, weights, add_slot, opt);
    if (!kl_failed(s))
        s = add_member(opt, &opt->grads, c, offsetof(kl_slot, g));
    if (!kl_failed(s))
        s = add_member(opt, &opt->moment1, c, offsetof(kl_slot, m));
    if (!kl_failed(s))
        s = add_member(opt, &opt->moment2, c, offsetof(kl_slot, v));
    if (kl_failed(s))
        kl_optimizer_close(opt);
    return s;
}

void kl_optimizer_close(kl_optimizer *opt)
{
    for (int64_t i = 0; i < opt->count; i++)
        free(opt->slots[i].name);
    free(opt->slots);
    kl_weights_free(&opt->grads);
    kl_weights_free(&opt->moment1);
    kl_weights_free(&opt->moment2);
    *opt = (kl_optimizer){0};
}

/* ---- what a resumed run must agree with ---- */

typedef struct facts {
    struct {
        const char *key;
        char value[TEXT];
    } fact[5];
} facts;

static facts facts_of(const kl_config *c, const kl_train_options *o, const kl_corpus *data)
{
    facts f = {{{"model", ""}, {"seed", ""}, {"batch", ""}, {"context", ""}, {"text", ""}}};
    snprintf(f.fact[0].value, TEXT, "%016" PRIx64, kl_model_fingerprint(c));
    snprintf(f.fact[1].value, TEXT, "%" PRIu64, o->seed);
    snprintf(f.fact[2].value, TEXT, "%" PRId64, o->batch);
    snprintf(f.fact[3].value, TEXT, "%" PRId64, o->context);
    snprintf(f.fact[4].value, TEXT, "%016" PRIx64, data->checksum);
    return f;
}

/* ---- the file ---- */

static const char *const KINDS[] = {"weight", "moment1", "moment2"};

static float *part_of(const kl_slot *s, int kind) { return kind == 0 ? s->w : kind == 1 ? s->m : s->v; }

/* "moment1.model.norm.weight"; free() it. */
static char *part_name(const kl_slot *s, int kind)
{
    size_t size = strlen(s->name) + 16;
    char *name = malloc(size);
    if (name)
        snprintf(name, size, "%s.%s", KINDS[kind], s->name);
    return name;
}

kl_status kl_state_save(const kl_optimizer *opt, const kl_config *c, const kl_train_options *o, const kl_corpus *data, int64_t step)
{
    char path[4096], steps[TEXT];
    KL_TRY(kl_out_path(path, sizeof path, o->out_dir, "training_state.safetensors"));
    snprintf(steps, sizeof steps, "%" PRId64, step);
    facts f = facts_of(c, o, data);
    const char *metadata[] = {"format", STATE_FORMAT, "step", steps, f.fact[0].key, f.fact[0].value, f.fact[1].key, f.fact[1].value,
                              f.fact[2].key, f.fact[2].value, f.fact[3].key, f.fact[3].value, f.fact[4].key, f.fact[4].value, NULL};
    int count = 0;
    kl_tensor *t = calloc((size_t)opt->count * 3 + 1, sizeof *t);
    kl_status s = t ? kl_ok() : kl_error(KL_ENOMEM, "training state: out of memory");
    for (int64_t i = 0; i < opt->count && !kl_failed(s); i++)
        for (int kind = 0; kind < 3; kind++) {
            t[count] = (kl_tensor){.name = part_name(&opt->slots[i], kind), .data = part_of(&opt->slots[i], kind), .dtype = KL_F32,
                                   .ndim = 1, .shape = {(int64_t)opt->slots[i].n}};
            if (!t[count++].name)
                s = kl_error(KL_ENOMEM, "training state: out of memory");
        }
    if (!kl_failed(s))
        s = kl_tensors_save(path, t, count, metadata);
    for (int i = 0; i < count; i++)
        free(t[i].name);
    free(t);
    return s;
}

static kl_status check_facts(const kl_tensors *t, const char *path, const kl_config *c, const kl_train_options *o, const kl_corpus *data)
{
    const char *format = kl_tensors_metadata(t, "format");
    if (!format || strcmp(format, STATE_FORMAT) != 0)
        return kl_error(KL_EFORMAT, "%s: expected format \"%s\", got \"%s\"", path, STATE_FORMAT, format ? format : "");
    facts f = facts_of(c, o, data);
    for (size_t i = 0; i < sizeof f.fact / sizeof *f.fact; i++) {
        const char *was = kl_tensors_metadata(t, f.fact[i].key);
        if (!was || strcmp(was, f.fact[i].value) != 0)
            return kl_error(KL_EINVAL, "resume: %s: the run was begun with %s %s, now it is %s", path, f.fact[i].key, was ? was : "(none)", f.fact[i].value);
    }
    return kl_ok();
}

static kl_status load_parts(kl_optimizer *opt, const kl_tensors *t, const char *path)
{
    /* Two passes: nothing is overwritten unless all of it is there. */
    for (int pass = 0; pass < 2; pass++)
        for (int64_t i = 0; i < opt->count; i++)
            for (int kind = 0; kind < 3; kind++) {
                const kl_slot *slot = &opt->slots[i];
                char *name = part_name(slot, kind);
                if (!name)
                    return kl_error(KL_ENOMEM, "training state: out of memory");
                const kl_tensor *x = kl_tensors_find(t, name);
                bool fits = x && x->dtype == KL_F32 && (size_t)kl_tensor_count(x) == slot->n;
                kl_status s = fits ? kl_ok() : kl_error(KL_EFORMAT, "%s: %s: expected %zu float32 numbers, got %s", path, name, slot->n,
                                                        x ? kl_dtype_name(x->dtype) : "nothing");
                free(name);
                KL_TRY(s);
                if (pass == 1)
                    memcpy(part_of(slot, kind), x->data, slot->n * sizeof(float));
            }
    return kl_ok();
}

kl_status kl_state_load(kl_optimizer *opt, const kl_config *c, const kl_train_options *o, const kl_corpus *data, int64_t *step)
{
    char path[4096];
    KL_TRY(kl_out_path(path, sizeof path, o->out_dir, "training_state.safetensors"));
    kl_tensors *t;
    KL_TRY(kl_error_in(kl_tensors_open(&t, path), "resume"));
    kl_status s = check_facts(t, path, c, o, data);
    const char *text = kl_tensors_metadata(t, "step");
    char *end = NULL;
    long long n = text ? strtoll(text, &end, 10) : -1;
    if (!kl_failed(s) && (n < 0 || !end || *end || end == text))
        s = kl_error(KL_EFORMAT, "%s: step: expected a number of at least 0, got \"%s\"", path, text ? text : "");
    if (!kl_failed(s))
        s = load_parts(opt, t, path);
    kl_tensors_close(t);
    if (!kl_failed(s))
        *step = (int64_t)n;
    return s;
}

/* ---- the whole checkpoint ---- */

/* A checkpoint is complete with the tokenizer it was trained with. */
static kl_status copy_tokenizer_file(const kl_train_options *o, const char *name)
{
    char from[4096], to[4096], *bytes;
    size_t size;
    KL_TRY(kl_out_path(from, sizeof from, o->tokenizer_dir, name));
    KL_TRY(kl_out_path(to, sizeof to, o->out_dir, name));
    if (access(from, F_OK) != 0)
        return kl_ok();
    KL_TRY(kl_file_read(from, (size_t)64 << 20, &bytes, &size));
    kl_writer w;
    kl_status s = kl_writer_open(&w, to);
    if (!kl_failed(s)) {
        s = kl_writer_write(&w, bytes, size);
        if (kl_failed(s))
            kl_writer_abandon(&w);
        else
            s = kl_writer_commit(&w);
    }
    free(bytes);
    return s;
}

kl_status kl_checkpoint_save(const kl_model *m, const kl_optimizer *opt, const kl_train_options *o, const kl_corpus *data, int64_t step)
{
    KL_TRY(kl_weights_save(&m->weights, &m->config, o->save_dtype, o->out_dir));
    if (o->tokenizer_dir) {
        KL_TRY(copy_tokenizer_file(o, "tiktoken.model"));
        KL_TRY(copy_tokenizer_file(o, "tokenizer_config.json"));
    }
    return kl_state_save(opt, &m->config, o, data, step);
}
