//! Examples and questions by seed: the same seed gives the same ones on any machine.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_pcg::Pcg64;

use super::Question;

/// Draws examples for a few-shot prompt, as many of each answer as can be (the odd one of either), in random order.
/// Fewer than `shots` if the pool has fewer.
#[must_use]
pub fn draw(pool: &[Question], shots: usize, seed: u64) -> Vec<Question> {
    let mut random = Pcg64::seed_from_u64(seed);
    let mut shuffled: Vec<&Question> = pool.iter().collect();
    shuffled.shuffle(&mut random);
    // A stable sort by how many of the same answer stand before: the first two are one of each, and so on.
    let mut seen = [0usize; 2];
    let mut ranked: Vec<(usize, &Question)> = shuffled
        .into_iter()
        .map(|question| {
            let count = &mut seen[usize::from(question.label)];
            *count += 1;
            (*count, question)
        })
        .collect();
    ranked.sort_by_key(|&(rank, _)| rank);
    ranked.truncate(shots);
    ranked.shuffle(&mut random);
    ranked.into_iter().map(|(_, question)| question.clone()).collect()
}

/// Draws `limit` questions, in the order of their file; all of them without a limit.
#[must_use]
pub fn sample(questions: Vec<Question>, limit: Option<usize>, seed: u64) -> Vec<Question> {
    let Some(limit) = limit.filter(|&limit| limit < questions.len()) else {
        return questions;
    };
    let mut random = Pcg64::seed_from_u64(seed);
    let mut chosen = rand::seq::index::sample(&mut random, questions.len(), limit).into_vec();
    chosen.sort_unstable();
    let mut chosen = chosen.into_iter().peekable();
    let questions = questions.into_iter().enumerate();
    questions
        .filter_map(|(index, question)| chosen.next_if_eq(&index).map(|_| question))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Questions whose labels are those of `labels`.
    fn pool(labels: &str) -> Vec<Question> {
        let question = |(line, label)| Question {
            line,
            prompt: format!("question {line}"),
            answers: vec![" no".into(), " yes".into()],
            label: label == '1',
        };
        (1..).zip(labels.chars()).map(question).collect()
    }

    fn lines(questions: &[Question]) -> Vec<usize> {
        questions.iter().map(|question| question.line).collect()
    }

    #[test]
    fn examples_are_balanced_where_that_is_possible() {
        let rare = pool("1111111101111111111101111111111");
        for seed in 0..50 {
            for (shots, zeros) in [(2, 1..=1), (4, 2..=2), (3, 1..=2), (7, 2..=2), (0, 0..=0)] {
                let drawn = draw(&rare, shots, seed);
                assert_eq!(drawn.len(), shots);
                let found = drawn.iter().filter(|question| !question.label).count();
                assert!(zeros.contains(&found), "{found} of {shots}");
                let mut distinct = lines(&drawn);
                distinct.sort_unstable();
                distinct.dedup();
                assert_eq!(distinct.len(), shots, "no example twice");
            }
        }
        assert_eq!(draw(&rare[..3], 4, 0).len(), 3);
    }

    #[test]
    fn the_seed_decides() {
        let pool = pool(&"10".repeat(100));
        assert_eq!(draw(&pool, 8, 5), draw(&pool, 8, 5));
        assert_ne!(draw(&pool, 8, 5), draw(&pool, 8, 6));
        let orders: Vec<bool> = (0..40).map(|seed| draw(&pool, 2, seed)[0].label).collect();
        assert!(
            orders.contains(&true) && orders.contains(&false),
            "either answer can come first"
        );
        let few = sample(pool.clone(), Some(9), 5);
        assert_eq!(few, sample(pool.clone(), Some(9), 5));
        assert_ne!(few, sample(pool.clone(), Some(9), 6));
    }

    #[test]
    fn a_sample_keeps_the_order() {
        let all = pool(&"1".repeat(60));
        let few = lines(&sample(all.clone(), Some(20), 1));
        assert_eq!(few.len(), 20);
        assert!(few.is_sorted_by(|a, b| a < b));
        assert_eq!(sample(all.clone(), Some(60), 1), all);
        assert_eq!(sample(all.clone(), None, 1), all);
    }
}
