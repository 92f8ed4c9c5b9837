"""The summary of the examples' results."""

import json

import pytest
import summary


@pytest.fixture
def summarize(tmp_path, capsys):
  """The rows that a file with these lines, (settings, results), is summarised in."""

  def rows(*records):
    file = tmp_path / 'lines.jsonl'
    lines = [json.dumps({'settings': settings, 'results': results}) for settings, results in records]
    file.write_text(''.join(f'{line}\n' for line in lines))
    summary.main([str(file)])
    head, rule, *body = capsys.readouterr().out.splitlines()
    assert rule == '|' + '---|' * (head.count('|') - 1)
    return [[cell.strip() for cell in row.strip('|').split('|')] for row in body]

  return rows


def losses(seed, **by_run):
  results = {
    name.replace('_', '-'): {'validation_loss': loss, 'bytes_per_param': 12 if name.endswith('fp32') else 3.0517}
    for name, loss in by_run.items()
  }
  return {'text': None, 'steps': 1000, 'runs': list(results), 'seed': seed}, results


def test_each_run_is_summarised_against_its_baselines(summarize):
  # Losses at 1 and 3 deviate by sqrt(2); differences of 0.1 and 0.3 by sqrt(0.02), and 12.706 sqrt(0.02 / 2) = 1.2706.
  assert summarize(
    losses(0, adamw_fp32=1.0, adamw_8bit=1.1),
    losses(1, adamw_fp32=3.0, adamw_8bit=3.3),
    # In lines of their own, in another order, one of them repeated.
    losses(1, lion_fp32=9.0),
    losses(1, lion_fp32=2.5, lion_8bit=3.5),
    losses(0, lion_fp32=1.5, lion_8bit=2.5),
  ) == [
    ['adamw-fp32', '2', '2.0000 ± 1.4142', '', '', '12.00'],
    ['adamw-8bit', '2', '2.2000 ± 1.5556', '+0.2000 ± 1.2706', '', '3.05'],
    ['lion-fp32', '2', '2.0000 ± 0.7071', '+0.0000 ± 6.3530', '', '12.00'],
    ['lion-8bit', '2', '3.0000 ± 0.7071', '+1.0000 ± 6.3530', '+1.0000 ± 0.0000', '3.05'],
  ]


def test_the_low_precision_network_is_summarised_beside_its_float32_one(summarize):
  def accuracies(seed, fp32, ours):
    results = {'lpmm': (ours, 2.078), 'fp32': (fp32, 8.0)}
    return {'dataset': 'digits', 'formats': 'int8', 'seed': seed}, {
      name: {'test_accuracy': accuracy, 'bytes_per_param': size} for name, (accuracy, size) in results.items()
    }

  # Deviations of 1, 2 and 1 over three seeds: 4.303 / sqrt(3) = 2.48.
  assert summarize(accuracies(0, 0.95, 0.94), accuracies(1, 0.96, 0.96), accuracies(2, 0.97, 0.98)) == [
    ['digits, int8', '3', '96.00 ± 1.00 %', '96.00 ± 2.00 %', '+0.00 ± 2.48', '2.08']
  ]
