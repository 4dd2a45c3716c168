//! Overlaps and spans over alignments of any origin: nothing panics, and spans stay inside.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xtokmap::{align_offsets, align_texts, map_spans, overlaps, Alignment, Kind, Side, SpanMode};
use xtokmap_fuzz::{aligned, cut, Input};

const SIDES: [Side; 2] = [Side::Student, Side::Teacher];

/// `exact`: made from tokens, so that a student token's bytes are all found on the other side.
fn check(a: &Alignment, input: &mut Input<'_>, exact: bool) {
    let all = overlaps(a);
    assert_eq!(all.indptr.len(), a.student_chunk.len() + 1);
    assert_eq!((all.indptr[0], all.indptr[a.student_chunk.len()]), (0, all.indices.len() as i64));
    assert_eq!(all.indices.len(), all.nbytes.len());
    assert!(all.indices.iter().all(|&j| (j as usize) < a.teacher_chunk.len()));
    for (i, &g) in a.student_chunk.iter().enumerate() {
        let entries = all.indptr[i] as usize..all.indptr[i + 1] as usize;
        let rewritten = g < 0 || a.kind[g as usize] == Kind::Rewritten;
        assert!(!rewritten || entries.is_empty());
        if exact && !rewritten {
            assert!(all.indices[entries.clone()].windows(2).all(|w| w[0] < w[1]));
            let start = if i == 0 { 0 } else { a.student_end[i - 1] };
            assert_eq!(all.nbytes[entries.clone()].iter().sum::<i32>(), a.student_end[i] - start);
            let stop = a.kind[g as usize] == Kind::Stop;
            assert!(all.nbytes[entries].iter().all(|&shared| (shared == 0) == stop));
        }
    }

    let lens = [a.student_chunk.len() as i64, a.teacher_chunk.len() as i64];
    for (to, [other, own]) in SIDES.into_iter().zip([lens, [lens[1], lens[0]]]) {
        let mut spans = vec![[0, own]];
        for _ in 0..input.byte() % 8 {
            let ends = [input.byte(), input.byte()].map(|b| i64::from(b) % (own + 1));
            spans.push([ends[0].min(ends[1]), ends[0].max(ends[1])]);
        }
        let [cover, inside] = [SpanMode::Cover, SpanMode::Inside].map(|mode| map_spans(a, &spans, to, mode).unwrap());
        for (cover, inside) in cover.into_iter().zip(inside) {
            for [start, stop] in [cover, inside] {
                assert!([start, stop] == [-1, -1] || 0 <= start && start < stop && stop <= other);
            }
            assert!(!exact || inside[0] < 0 || cover[0] <= inside[0] && inside[1] <= cover[1], "{cover:?} {inside:?}");
        }
        let wild = [i64::from(input.byte() as i8), i64::from(input.number() as i16) << (input.byte() % 48)];
        let fits = 0 <= wild[0] && wild[0] <= wild[1] && wild[1] <= own;
        assert_eq!(map_spans(a, &[wild], to, SpanMode::Cover).is_ok(), fits);
    }
}

/// Numbers of any size, mostly small.
fn offsets(input: &mut Input<'_>, sorted: bool) -> Vec<[i64; 2]> {
    let (mut start, mut stop) = (0, 0);
    let spans = (0..input.byte() % 24).map(|_| {
        let what = input.byte();
        if !sorted {
            return [i64::from(what as i8) << (what % 60), i64::from(input.byte() as i8) << (what / 4)];
        }
        start += i64::from(what % 8) * i64::from(what % 3);
        stop = (start + i64::from(what / 16)).max(stop);
        [start, stop]
    });
    spans.collect()
}

/// Any alignment whose fields fit each other.
fn any(input: &mut Input<'_>) -> Alignment {
    const KINDS: [Kind; 7] = [
        Kind::OneToOne,
        Kind::OneToMany,
        Kind::ManyToOne,
        Kind::ManyToMany,
        Kind::Rewritten,
        Kind::Stop,
        Kind::Marker,
    ];
    let chunks = usize::from(input.byte() % 6);
    let mut side = || {
        let tokens = usize::from(input.byte() % 12);
        let mut rising = |n: usize, at_most: i32| {
            let mut numbers: Vec<i32> = (0..n).map(|_| i32::from(input.byte()).min(at_most)).collect();
            numbers.sort_unstable();
            numbers
        };
        let (ptr, end, start) = (rising(chunks + 1, tokens as i32), rising(tokens, i32::MAX), rising(tokens, i32::MAX));
        (ptr, (0..tokens).map(|_| i32::from(input.byte() as i8) % (chunks as i32 + 1) - 1).collect(), end, start)
    };
    let ((student_ptr, student_chunk, student_end, s), (teacher_ptr, teacher_chunk, teacher_end, t)) = (side(), side());
    let kind = (0..chunks).map(|_| KINDS[usize::from(input.byte()) % 6]).collect();
    let starts = (input.byte() % 2 == 0).then(|| Box::new((s, t)));
    Alignment {
        student_ptr,
        teacher_ptr,
        kind,
        student_chunk,
        teacher_chunk,
        student_end,
        teacher_end,
        starts,
        ..Alignment::default()
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    match input.byte() % 5 {
        0 => {
            let invalid = [input.invalid(), input.invalid()];
            let lengths = [input.byte() % 32, input.byte() % 32].map(usize::from).map(|n| input.bytes(n));
            let spans = input.bytes(24);
            let same = input.byte() % 2 == 0;
            let (x, y) = if same {
                (input.0, input.0)
            } else {
                let at = usize::from(input.number()) % (input.0.len() + 1);
                input.0.split_at(at)
            };
            let (mut student, mut teacher) = (cut(x, lengths[0]), cut(y, lengths[1]));
            for tokens in [&mut student, &mut teacher] {
                tokens.iter_mut().filter(|token| token.bytes.is_empty()).skip(1).for_each(|token| token.stop = true);
            }
            check(&aligned(&student, &teacher, invalid), &mut Input(spans), true);
        }
        1 => {
            let (student, teacher) = (offsets(&mut input, false), offsets(&mut input, false));
            if let Ok(a) = align_offsets(&student, &teacher) {
                a.check().unwrap();
                check(&a, &mut input, false);
            }
        }
        2 => {
            let (student, teacher) = (offsets(&mut input, true), offsets(&mut input, true));
            let a = align_offsets(&student, &teacher).unwrap();
            a.check().unwrap();
            check(&a, &mut input, false);
            // A student span starts in the teacher's span at which it is placed.
            for (i, span) in student.iter().enumerate().filter(|&(i, _)| a.teacher_pos[i] >= 0) {
                let other = teacher[a.teacher_pos[i] as usize];
                assert_eq!(other[0] + i64::from(a.teacher_off[i]), span[0]);
                assert!(other[0] <= span[0] && span[0] < other[1]);
            }
            for (chunk, spans, others) in
                [(&a.student_chunk, &student, &teacher), (&a.teacher_chunk, &teacher, &student)]
            {
                for (&g, span) in chunk.iter().zip(spans) {
                    let meets = |o: &[i64; 2]| span[0].max(o[0]) < span[1].min(o[1]);
                    assert!(g >= 0 || !others.iter().any(meets), "{span:?} is left out");
                }
            }
        }
        3 => {
            let a = any(&mut input);
            if a.check().is_ok() {
                check(&a, &mut input, false);
            }
        }
        _ => {
            let at = usize::from(input.number()) % (input.0.len() + 1);
            let (a, b) = input.0.split_at(at);
            let pieces = |text: &[u8]| {
                text.split(|&b| b == b'|').map(|piece| String::from_utf8_lossy(piece).into_owned()).collect::<Vec<_>>()
            };
            let (a, b) = (pieces(a), pieces(b));
            let (forth, back) = align_texts(&a, &b);
            assert_eq!((forth.len(), back.len()), (a.len(), b.len()));
            for (i, others) in forth.iter().enumerate() {
                assert!(others.windows(2).all(|w| w[0] < w[1]));
                assert!(others.iter().all(|&j| back[j].contains(&i)));
            }
            for (j, others) in back.iter().enumerate() {
                assert!(others.windows(2).all(|w| w[0] < w[1]));
                assert!(others.iter().all(|&i| forth[i].contains(&j)));
            }
        }
    }
});
