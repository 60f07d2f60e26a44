//! The last tokens in f16 against a plain reference in f64.

mod common;

use common::{Random, RecentCase};

#[test]
fn queries_see_what_their_indices_name() {
    for (i, case) in RecentCase::all().into_iter().enumerate() {
        let x = case.inputs(&mut Random(i as u64 + 1));
        let mut first: Option<Vec<f32>> = None;
        for nth in [1, 2, 5] {
            let mut slots = x.slots.clone();
            let mut out =
                vec![f32::NAN; case.n_stream * case.n_token * case.n_head * (4 + case.head_dim[1])];
            let [k, v] = &mut slots;
            let slots_at = [k.as_mut_ptr(), v.as_mut_ptr()];
            let cur = [x.cur[0].as_ptr(), x.cur[1].as_ptr()];
            let p = case.params(
                x.q.as_ptr(),
                cur,
                slots_at,
                x.idxs.as_ptr(),
                out.as_mut_ptr(),
            );
            for ith in (0..nth).rev() {
                // SAFETY: the shapes are those of the case
                unsafe { p.run(ith, nth) };
            }
            case.check(&x, &out);
            assert!(slots == case.stored(&x), "slots of {case:?}");
            let same = first
                .get_or_insert_with(|| out.clone())
                .iter()
                .zip(&out)
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{nth} shares change the result of {case:?}");
        }
    }
}

#[test]
fn tokens_are_stored_without_queries() {
    for (i, case) in RecentCase::all().into_iter().enumerate() {
        let x = case.inputs(&mut Random(i as u64 + 50));
        let mut slots = x.slots.clone();
        let [k, v] = &mut slots;
        let slots_at = [k.as_mut_ptr(), v.as_mut_ptr()];
        let cur = [x.cur[0].as_ptr(), x.cur[1].as_ptr()];
        let p = case.params(
            std::ptr::null(),
            cur,
            slots_at,
            x.idxs.as_ptr(),
            std::ptr::null_mut(),
        );
        // SAFETY: the shapes are those of the case
        unsafe { p.run(0, 1) };
        assert!(slots == case.stored(&x), "slots of {case:?}");
    }
}
